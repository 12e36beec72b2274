"""How much of what: sizes and a rule in, shares out. Arithmetic only; rows are mixture.py's.

A rule is a dict, flat as config.data.mixture. n_l is the size of language l, what its sources hold
together; w_l its share, up to a factor that makes the shares sum to 1; inside a language sources
share by size. READS says which kind reads which field.

  temperature  w_l = n_l^alpha; alpha, or 1 / temperature if alpha is not given; alpha 0: all equal
  unimax       w_l = min(epochs n_l, what is left of the budget / languages left), the smallest
               language first (Chung et al. 2023, arXiv 2304.09151)
  buckets      w_l = d_l b_l (Tiny Aya report, Eq. 1) with d_l = n_l^alpha, sum 1, and |B| languages
               of the same family, (genus,) and script as l; reading A: b_l = 1 / |B|; reading B:
               w_l = (sum of d in B)^(1 / bucket_temperature) / |B|. Counted are the languages that
               have sources and take part, not those of the table; `code` is a bucket of its own
  explicit     weights, pairs (language, region, 'code' or 'code/source', share) that sum to 1; in
               a group languages share by n_l^alpha, by size if neither alpha nor temperature is
               given. The weights name who takes part, so there is no `languages`

What every kind reads, applied in this order after the rule:

  keep    (name, factor)...  w_l <- factor w_l, and 0 for languages that are not named: a mask. A
                             language named by itself has its own factor, not its region's
  fixed   (name, share)...   the group's w sum to exactly this share of the whole, in the rule's
                             proportions, and the others' to the rest; takes part even if
                             `languages` does not name it
  floor   share              w_l <- max(floor, c w_l) for languages that are not fixed, with the c
                             that keeps their sum
  within  (source, share)... in every language that has a source of this name, w <- share w_l, and
                             the others keep their proportions; in one that has named sources only,
                             they share as the pairs do. 0 leaves the source out, and its size too
  unit    tokens or bytes: what sizes, shares and budget count
  absent  refuse, or leave_out: a language that is named and has no sources; without it the other
          weights keep their proportions

After unimax they may lift a language above `epochs`, and the cap holds of a stage, not of what
earlier ones drew: mixture.table says what is drawn in all, and warns of who is above it.
"""

import math
import numbers

from tiny_aya_jax import languages
from tiny_aya_jax import run

# One exception, because configs set it: a `temperature` that unimax does not read is no error.
READS = dict(
    temperature=("languages", "temperature", "alpha"),
    unimax=("languages", "epochs", "budget"),
    buckets=("languages", "temperature", "alpha", "by", "reading", "bucket_temperature"),
    explicit=("weights", "temperature", "alpha"),
)
EVERY_KIND = ("keep", "fixed", "floor", "within", "unit", "absent")
FIELDS = dict.fromkeys((*sum(READS.values(), ()), *EVERY_KIND))
MAY_LACK = ("temperature", "alpha", "bucket_temperature", *EVERY_KIND)
PAIRS = ("weights", "keep", "fixed", "within")
UNITS = ("tokens", "bytes")
ABSENT = ("refuse", "leave_out")
# What each number, or each second of a pair, must be.
NUMBERS = dict(
    temperature=(lambda x: 0 < x < math.inf, "a positive number; alpha 0 is equal shares"),
    alpha=(lambda x: 0 <= x < math.inf, "a number of at least 0"),
    epochs=(lambda x: 0 < x < math.inf, "a positive number"),
    budget=(lambda x: 0 < x < math.inf, "a positive number"),
    bucket_temperature=(lambda x: 0 < x, "a positive number, 'inf' for equal buckets"),
    floor=(lambda x: 0 <= x <= 1, "a share of the whole, 0 to 1"),
    weights=(lambda x: 0 < x < math.inf, "a share above 0; leave out what is not wanted"),
    keep=(lambda x: 0 <= x < math.inf, "a factor of at least 0"),
    fixed=(lambda x: 0 < x <= 1, "a share of the whole, above 0 and at most 1"),
    within=(lambda x: 0 <= x <= 1, "a share of the language, 0 to 1"),
)
TOLERANCE = 1e-6  # of sums of shares that people write
BUCKETS = dict(
    family=lambda language: (language.family, language.script),
    genus=lambda language: (language.family, language.genus, language.script),
)
_LANGUAGES = {language.code: language for language in languages.LANGUAGES}


def weights(sizes, rule):
  """{"<code>/<source>" or "<code>": amount}, rule -> {name: share}; the shares sum to 1.

  Sources that the rule leaves out are absent from the result. Refused: a field, name or number
  that is wrong or that the kind does not read.
  """
  for name, size in sizes.items():
    if not size > 0:
      raise run.Refused(f"source {name!r} has {size} tokens or bytes: leave it out of the mixture")
  rule = _of_present(checked(rule), set(map(_code, sizes)))
  own = set(READS[rule["kind"]]) - {"languages", "temperature"}  # _available and _alpha read them
  _check_left_out(sizes, rule)
  share = RULES[rule["kind"]](_available(sizes, rule), **{field: rule[field] for field in own})
  if lost := sorted({_code(name) for name, part in share.items() if not part}):
    raise run.Refused(f"the shares of {', '.join(lost)} are too small for a double: leave them out "
                      "of the mixture, or raise its temperature")
  share = _total(share, 1)
  share = _kept(share, rule["keep"])
  share = _fixed(share, rule["fixed"])
  share = _floored(share, rule["floor"], rule["fixed"])
  share = _total(_within(share, rule["within"]), 1)
  return {name: share[name] for name in sizes if share.get(name)}


def _of_present(rule, codes):
  """With absent "leave_out", the rule less what it says of languages that have no sources."""
  if rule["absent"] is None:
    return rule
  given, rule = rule, dict(rule)
  for field in ("weights", "keep", "fixed"):
    if field in rule:
      rule[field] = tuple(pair for pair in rule[field]
                          if codes & set(languages.expand(pair[0].partition("/")[0])))
  if "languages" in rule:
    rule["languages"] = tuple(name for name in rule["languages"] if codes & set(languages.expand(name)))
  if any(given.get(name) and not rule[name] for name in ("weights", "languages", "keep")):
    raise run.Refused("the mixture names no language that has sources: there are sources of "
                      + ", ".join(sorted(codes)))
  if "weights" in rule:
    _check_total(given["weights"])
    here = math.fsum(share for _, share in rule["weights"])
    rule["weights"] = tuple((name, share / here) for name, share in rule["weights"])
  return rule


def _check_total(weights):
  total = math.fsum(share for _, share in weights)
  if abs(total - 1) > TOLERANCE:
    raise run.Refused(
        f"the mixture weights sum to {total:.8g}, expected 1: divide each by {total:.8g}"
    )


def _check_left_out(sizes, rule):
  """Refuses a rule whose `within` of share 0 takes away all, or what its weights name."""
  left_out = {source for source, share in rule["within"] if not share}
  if left_out and all(_source(name) in left_out for name in sizes):
    raise run.Refused(f"mixture within gives {', '.join(sorted(left_out))} the share 0, and there "
                      "is nothing else: set --config.data.mixture.within='()'")
  for name, _ in rule.get("weights", ()):
    if _source(name) in left_out:
      raise run.Refused(f"mixture weights name {name!r}, and within gives its source the share 0: "
                        "leave it out of within")


def checked(rule):
  """The rule with every field it reads, absent ones None or (), pairs as tuples; refuses others.

  `alpha` is the exponent; `temperature` stays if it says the same.
  """
  rule = {field: tuple(value) if isinstance(value, list) else value
          for field, value in rule.items()}
  kind = run.choose("mixture kind", rule.pop("kind", None), READS)
  _refuse_unread(kind, rule)
  found = {field: _read(kind, field, rule.get(field)) for field in (*READS[kind], *EVERY_KIND)}
  if "languages" in found:
    languages.select(found["languages"])  # refuses an unknown name
  if "alpha" in found:
    alpha = _alpha(kind, found)
    if found["temperature"] is not None and alpha != 1 / found["temperature"]:
      found["temperature"] = None
    found["alpha"] = alpha
  # Shares of sizes alone have no unit; of rows, tokens are the house's.
  unit = run.choose("mixture unit", found["unit"] or "tokens", UNITS)
  if run.choose("mixture absent", found["absent"] or "refuse", ABSENT) == "refuse":
    found["absent"] = None  # the same, said by nothing
  return found | dict(kind=kind, unit=unit)


def _read(kind, field, value):
  if field in PAIRS:
    value = _pairs(field, value)
  elif field in NUMBERS and value is not None:
    _number(f"mixture {field}", field, value)
  if _unset(value) and field not in MAY_LACK:
    raise run.Refused(f"a {kind} mixture needs the field {field!r}")
  return value


def _refuse_unread(kind, rule):
  for field, value in rule.items():
    run.choose("mixture field", field, FIELDS)
    everybody = field == "languages" and value == ("all",)  # of the config, and leaves nobody out
    if not (_unset(value) or everybody) and field not in (*READS[kind], *EVERY_KIND, "temperature"):
      readers = [other for other, fields in READS.items() if field in fields]
      raise run.Refused(
          f"mixture {field} is {value!r}, which a {kind} mixture does not read: leave it unset, or "
          f"choose the kind {' or '.join(readers)}"
      )


def _unset(value):
  return value is None or isinstance(value, tuple) and not value


def _pairs(field, value):
  """A mapping or ((name, number), ...) -> ((name, number), ...); None -> ()."""
  pairs = tuple(value.items()) if hasattr(value, "items") else () if value is None else value
  if not isinstance(pairs, tuple) or not all(
      isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
      for pair in pairs
  ):
    raise run.Refused(
        f"mixture {field} is {value!r}: expected pairs of a name and a number, such as "
        "(('eng_Latn', 0.3), ('Africa', 0.7)), and (('eng_Latn', 0.3),) for one"
    )
  for name, number in pairs:
    _number(f"mixture {field} of {name!r}", field, number)
  return tuple(map(tuple, pairs))


def _number(what, field, value):
  allowed, words = NUMBERS[field]
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not real or not allowed(value):
    raise run.Refused(f"{what} is {value!r}: expected {words}")


def _alpha(kind, rule):
  if rule["alpha"] is not None:
    return rule["alpha"]
  if rule["temperature"] is not None:
    return 1 / rule["temperature"]
  if kind == "explicit":
    return 1
  raise run.Refused(f"a {kind} mixture needs the field 'temperature' or 'alpha'")


def words(rule):
  """One line: the kind and every field that is read and set."""
  rule = checked(rule)
  if rule.get("temperature") is not None:
    rule["alpha"] = None  # the same, said once
  fields = [field for field in (*READS[rule["kind"]], *EVERY_KIND) if not _unset(rule[field])]
  return f"{rule['kind']}: " + ", ".join(f"{field} {_written(rule[field])}" for field in fields)


def _written(value):
  if not isinstance(value, tuple):
    return f"{value:g}" if isinstance(value, float) else str(value)
  parts = [part if isinstance(part, str) else f"{part[0]} {part[1]:g}" for part in value]
  return " + ".join(parts)


def asked(rule):
  """Codes of all languages that the rule is about, whether they have sources or not."""
  rule = checked(rule)
  names = rule.get("languages") or [name.partition("/")[0] for name, _ in rule["weights"]]
  codes = set(languages.select((*names, *(name for name, _ in rule["fixed"]))))
  kept = [name for name, factor in rule["keep"] if factor]
  return codes & set(languages.select(kept)) if kept else codes


def _available(sizes, rule):
  """The sources that take part: of the rule's languages, less those of a share of 0."""
  left_out = {source for source, share in rule["within"] if not share}
  sizes = {name: size for name, size in sizes.items() if _source(name) not in left_out}
  if "languages" not in rule:
    return sizes
  codes = present((*rule["languages"], *(name for name, _ in rule["fixed"])), map(_code, sizes))
  return {name: size for name, size in sizes.items() if _code(name) in codes}


def _temperature(sizes, alpha):
  return _inside(sizes, _powers(_by_language(sizes), alpha))


def _unimax(sizes, epochs, budget):
  size, share = _by_language(sizes), {}
  order = sorted(size, key=size.get)
  for done, code in enumerate(order):
    share[code] = min(budget / (len(order) - done), epochs * size[code])
    budget -= share[code]
  return _inside(sizes, share)


def _buckets(sizes, alpha, by, reading, bucket_temperature):
  bucket = BUCKETS[run.choose("mixture by", by, BUCKETS)]
  run.choose("mixture reading", reading, ("A", "B"))
  if (reading == "B") != (bucket_temperature is not None):
    raise run.Refused(
        f"mixture bucket_temperature is {bucket_temperature} and reading {reading!r}: B needs it "
        "(1 keeps the buckets as they are, 'inf' makes them equal), A does not read it"
    )
  natural = _total(_powers(_by_language(sizes), alpha), 1)
  members = {}
  for code in natural:
    members.setdefault(bucket(_LANGUAGES[code]) if code in _LANGUAGES else code, []).append(code)
  # Of the largest bucket, so that its power is 1.
  most = max(math.fsum(natural[code] for code in codes) for codes in members.values())
  share = {}
  for codes in members.values():
    mass = math.fsum(natural[code] for code in codes)
    for code in codes:
      one = natural[code] if reading == "A" else (mass / most) ** (1 / bucket_temperature)
      share[code] = one / len(codes)
  return _inside(sizes, share)


def _explicit(sizes, weights, alpha):
  _check_total(weights)
  share = {}
  for key, weight in weights:
    group = {name: sizes[name] for name in _sources_of(key, sizes)}
    for name, part in _total(_temperature(group, alpha), weight).items():
      if name in share:
        raise run.Refused(f"source {name!r} is given a mixture weight twice, once as {key!r}")
      share[name] = part
  return share


# Another rule is another function of (sizes, its own fields) and a line here and in READS.
RULES = dict(temperature=_temperature, unimax=_unimax, buckets=_buckets, explicit=_explicit)


def _sources_of(key, sizes):
  if "/" in key:
    return [run.choose("source in the mixture weights", key, sizes)]
  codes = present([key], map(_code, sizes))
  return [name for name in sizes if _code(name) in codes]


def present(names, codes):
  """Language names, regions or 'all' -> those of `codes` they cover, in table order.

  'all' and a region mean what there is of them; a language that was named must be there.
  """
  codes = set(codes)
  for name in names:
    if codes.isdisjoint(languages.expand(name)):
      raise run.Refused(f"no source of {name!r}: there are sources of {', '.join(sorted(codes))}")
  return tuple(code for code in languages.select(names) if code in codes)


def _kept(share, pairs):
  if not pairs:
    return share
  here = {_code(name) for name in share}
  groups = [(len(languages.expand(name)), name, factor) for name, factor in pairs]
  factor, width = {}, {}
  for many, name, number in sorted(groups, key=lambda group: -group[0]):  # the narrowest last
    for code in present([name], here):
      if width.get(code) == many:
        raise run.Refused(f"mixture keep names {code} twice, once as {name!r}")
      factor[code], width[code] = number, many
  kept = {name: part * factor.get(_code(name), 0) for name, part in share.items()}
  kept = {name: part for name, part in kept.items() if part}
  if not kept:
    raise run.Refused(f"mixture keep is {pairs!r}: nothing is left of the mixture")
  return _total(kept, 1)


def _fixed(share, pairs):
  if not pairs:
    return share
  groups = _groups("fixed", pairs, share)
  taken = {code for codes, _ in groups for code in codes}
  others = sorted({_code(name) for name in share} - taken)
  total = math.fsum(part for _, part in groups)
  if total > 1 + TOLERANCE or (abs(total - 1) <= TOLERANCE) == bool(others):
    raise run.Refused(
        f"the fixed shares of the mixture sum to {total:.8g} and {len(others)} other languages "
        "take part: expected less than 1 with others, and 1 without"
    )
  found = _total(_of(share, others), 1 - total) if others else {}
  for codes, part in groups:
    found |= _total(_of(share, codes), part)
  return found


def _floored(share, floor, fixed):
  """Water-filling: whoever is below the floor is lifted to it, the others pay in proportion."""
  taken = {code for codes, _ in _groups("fixed", fixed, share) for code in codes}
  before = {code: part for code, part in _by_language(share).items() if code not in taken}
  total = math.fsum(before.values())
  if not floor or not before:
    return share
  if floor * len(before) > total * (1 + TOLERANCE):
    raise run.Refused(
        f"a mixture floor of {floor} for {len(before)} languages is {floor * len(before):.4g}, "
        f"more than the {total:.4g} they share: give at most {total / len(before):.4g}"
    )
  after, low = dict(before), set()
  while more := {code for code in before if code not in low and after[code] < floor}:
    low |= more
    high = {code: part for code, part in before.items() if code not in low}
    after = dict.fromkeys(low, floor) | _total(high, total - floor * len(low))
  return {name: part * after.get(_code(name), 1) / before.get(_code(name), 1)
          for name, part in share.items()}


def _within(share, pairs):
  wanted = dict(pairs)
  if len(wanted) < len(pairs) or math.fsum(wanted.values()) > 1 + TOLERANCE:
    raise run.Refused(
        f"mixture within is {pairs!r}: expected each source once and a sum of at most 1"
    )
  for source in wanted:
    if wanted[source]:
      run.choose("source of mixture within, which no language has,", source,
                 {_source(name) for name in share})
  found = {}
  for code, total in _by_language(share).items():
    named = {name: wanted[_source(name)] for name in _of(share, [code]) if _source(name) in wanted}
    rest = {name: part for name, part in _of(share, [code]).items() if name not in named}
    left = max(0, 1 - math.fsum(named.values()))
    found |= _total(named | (_total(rest, left) if rest else {}), total)
  return found


def _groups(field, pairs, share):
  """((name, number), ...) -> [(its languages with a share, number), ...]; none of them twice."""
  codes, groups, seen = {_code(name) for name in share}, [], {}
  for name, number in pairs:
    group = present([name], codes)
    for code in group:
      if code in seen:
        raise run.Refused(f"mixture {field} names {code} twice, as {seen[code]!r} and as {name!r}")
      seen[code] = name
    groups.append((group, number))
  return groups


def _of(share, codes):
  return {name: part for name, part in share.items() if _code(name) in codes}


def _total(share, total):
  """The same proportions with the sum `total`."""
  now = math.fsum(share.values())
  if not now > 0:
    raise run.Refused(f"the mixture's shares of {', '.join(sorted(share))} are too small for a "
                      "double: use less extreme factors and temperatures")
  return {name: total * part / now for name, part in share.items()}


def _by_language(sizes):
  found = {}
  for name, size in sizes.items():
    found[_code(name)] = found.get(_code(name), 0) + size
  return found


def _inside(sizes, share):
  """Shares of languages -> shares of their sources, by size."""
  size = _by_language(sizes)
  return {name: share[_code(name)] * sizes[name] / size[_code(name)] for name in sizes}


def _powers(size, alpha):
  largest = max(size.values())  # so that the largest power is 1
  return {code: (size[code] / largest) ** alpha for code in size}


def _code(name):
  return name.partition("/")[0]


def _source(name):
  return name.partition("/")[2]
