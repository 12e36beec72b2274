"""The embedded wiring corpus: real words of all 70 languages, made from CLDR through Babel.

Nothing to download and no licence question; enough to see that every stage learns, not enough to
teach a language. It is data in the language's own words (countries with their currencies and
languages, dates, quantities, durations, lists), never English sentence frames.

A *fact* is a tuple that belongs to no language, such as ("money", "BR"); `render` says it in one.
Held out by fact: about one territory in ten, and so every sentence about it, is in `validation` in
all languages; so are one in ten of all other facts, except the order of days and months, which
cannot be held out. `instruct` and `preference` use train facts only, `preference_validation` held-out.
Under 300 distinct words in train, for want of CLDR: Malagasy 259, Shona 262, Maltese 296.
Deterministic in (code, split) for one Babel version; independent of process and Python version.
"""

import copy
import datetime
import functools
import hashlib
import itertools
import random
from typing import NamedTuple
import unicodedata

import babel
from babel import dates, lists, localedata, numbers, units
from babel.core import get_global

from tiny_aya_jax import languages, run

SPLITS = ("train", "validation", "instruct", "preference", "preference_validation")

# Train bytes follow FineWeb-2 bytes to this power, English (the largest) at the upper limit.
# Ours: the exponent of temperature 3.33, so that the languages are unequal but none is invisible.
EXPONENT = 0.3
TRAIN_BYTES = (20_000, 400_000)
VALIDATION_BYTES = 5_000
INSTRUCT_BYTES = 10_000
PREFERENCE_BYTES = dict(preference=3_000, preference_validation=1_000)
DOCUMENT_BYTES = (100, 800)

# code -> Babel locale, where it is not the ISO code.
_LOCALES = dict(
  nob_Latn="nb",
  fil_Latn="fil",
  srp_Cyrl="sr_Cyrl",
  pan_Guru="pa_Guru",
  cmn_Hans="zh_Hans",
  cmn_Hant="zh_Hant",
)

# What ends a sentence and what follows a heading, where it is not ". " and ": ".
_IDEOGRAPHIC = dict.fromkeys(("cmn_Hans", "cmn_Hant", "yue_Hani", "jpn_Jpan"), "。")
_DANDA = dict.fromkeys(("hin_Deva", "npi_Deva", "ben_Beng", "pan_Guru"), "। ")
_STOPS = {
  **_IDEOGRAPHIC,
  **_DANDA,
  "urd_Arab": "۔ ",
  "mya_Mymr": "။ ",
  "khm_Khmr": "។ ",
  "amh_Ethi": "። ",
  "tha_Thai": " ",
  "lao_Laoo": " ",
}
_COMMAS = {
  **dict.fromkeys(_IDEOGRAPHIC, "，"),
  **dict.fromkeys(("arb_Arab", "fas_Arab", "urd_Arab"), "، "),
}
_COLONS = {**dict.fromkeys(_IDEOGRAPHIC, "："), "fra_Latn": "\u00a0: ", "amh_Ethi": "፦ "}

_UNITS = (
  *("length-kilometer", "length-meter", "length-centimeter", "mass-kilogram", "mass-gram"),
  *("volume-liter", "area-square-kilometer", "area-hectare", "temperature-celsius"),
  *("duration-year", "duration-month", "duration-week", "duration-day", "duration-hour"),
  *("duration-minute", "duration-second", "speed-kilometer-per-hour", "digital-gigabyte"),
  *("power-watt", "energy-kilowatt-hour", "volume-cup", "volume-tablespoon", "mass-tonne"),
)
_SPANS = dict(second=1, minute=60, hour=3600, day=86400, week=604800, month=2592000, year=31536000)


def documents(code, split):
  """The documents of one language and split, always the same ones.

  Yields str ('train', 'validation': 100 to 800 bytes each), a list of {"role", "content"}
  ('instruct') or {"messages", "chosen", "rejected"} (of preferences). Refuses a code that is not one of the 70, and an unknown split.
  """
  run.choose("toy split", split, SPLITS)
  words = _words(languages.find(code).code)
  source = random.Random(f"{words.code}/{split}")  # a str seed is hashed by SHA-512, not hash()
  make = dict(instruct=_conversation, preference=_pair).get(split.partition("_")[0], _paragraph)
  written, seen = 0, set()
  while written < size(words.code, split):
    document = make(words, source, split.endswith("validation"))
    if str(document) not in seen:
      seen.add(str(document))
      written += _bytes(document)
      yield document


def cloze(code):
  """[{"context", "between", "choices", "answer"}]: lists of four days or months, and what may come last.

  Of four, one is right, one is of the same kind, two are of the other. The order of both is in every
  split: whoever has read it ranks the right one first.
  """
  words, items = _words(code), []
  for names, others in ((words.days, words.months), (words.months, words.days)):
    for start in range(len(names) if all(names + others) else 0):
      first, right, wrong = (names[(start + at) % len(names)] for at in (0, 3, 5))
      choices = [right, wrong, others[start % len(others)], others[(start + 3) % len(others)]]
      choices = choices[-(start % 4):] + choices[: -(start % 4)]  # the right one is at any place
      listed = [first, *(names[(start + at) % len(names)] for at in (1, 2))]
      said = [_listed(words, [*listed, name]) for name in choices]
      begun = {text[: text.rindex(name)] for text, name in zip(said, choices)}
      if len(begun) == 1:  # 'and' may depend on the word behind it
        context = (text := begun.pop()).rstrip()
        items.append(dict(context=context, between=text[len(context):], choices=choices,
                          answer=choices.index(right)))
  return items


def parallel(code):
  """[{"prompt", "source", "reference"}]: held-out facts in English and in this language, at most 20, and
  the question of `instruct` for them; none where CLDR has no English name of the language."""
  words, english = _words(code), _words("eng_Latn")
  source, items = random.Random(f"{words.code}/parallel"), {}
  for _ in range(200):
    asked = _translated(words, english, source, True) if words is not english else None
    if asked and len(items) < 20:
      said = asked[0].partition(english.colon)[2]
      items[said] = dict(prompt=asked[0], source=said, reference=asked[1])
  return list(items.values())


def tongues(code, codes):
  """{code of a language: its name in the language of `code`}; None where CLDR has none there."""
  words = _words(code)
  tags = {other: _LOCALES.get(other, languages.find(other).iso) for other in codes}
  return {other: words.languages.get(tag) or words.languages.get(tag.partition("_")[0])
          for other, tag in tags.items()}


def own_name(code):
  """A language's name in itself, or None."""
  return _words(code).own_name


def listed(code, names):
  """'A, B and C' as the language of `code` joins names; each once."""
  return _listed(_words(code), names)


def size(code, split):
  """Bytes after which `documents(code, split)` stops (it ends with the document that passes it)."""
  if split in PREFERENCE_BYTES:
    return PREFERENCE_BYTES[split]
  if split != "train":
    return VALIDATION_BYTES if split == "validation" else INSTRUCT_BYTES
  low, high = TRAIN_BYTES
  largest = max(language.fineweb_bytes for language in languages.LANGUAGES)
  share = (languages.find(code).fineweb_bytes / largest) ** EXPONENT
  return int(min(max(high * share, low), high))


def held_out(*fact):
  """Whether a fact belongs to validation: one in ten, by a hash, in all languages alike."""
  return hashlib.sha256("/".join(map(str, fact)).encode()).digest()[0] < 26


def _bytes(document):
  if isinstance(document, dict):
    return _bytes([*document["messages"], *({"content": document[side]} for side in ("chosen", "rejected"))])
  texts = [document] if isinstance(document, str) else [turn["content"] for turn in document]
  return sum(len(text.encode()) for text in texts)


# --- documents ----------------------------------------------------------------------------------


def _paragraph(words, source, held):
  """Several facts, half of them about one territory, as one paragraph or as lines."""
  stop = "\n" if source.random() < 0.25 else words.stop
  about = _territory(source, held)
  aim = _between(source, 150, 600)
  text = ""
  while len(text.encode()) < aim:
    draw = _pick(source, _ABOUT if source.random() < 0.5 else _DRAWS)
    said = render(words, draw(source, held, about))
    longer = f"{text.removesuffix(stop.strip())}{stop}{said}" if text else said
    if said and said not in text and len(longer.encode()) < DOCUMENT_BYTES[1]:
      text = longer
  return (text.removesuffix(stop.strip()) + stop).strip()


def _conversation(words, source, held):
  """One exchange, sometimes two, sometimes after a system message naming the language."""
  kinds = (_translate, _translate, _continue, _choose, _add, _count_on)
  turns = []
  if words.own_name and source.random() < 0.12:
    turns.append(dict(role="system", content=words.own_name))
  exchanges = 2 if source.random() < 0.2 else 1
  while exchanges:
    asked = _pick(source, kinds)(words, source, held)
    if asked:
      question, answer = asked
      turns.append(dict(role="user", content=question))
      turns.append(dict(role="assistant", content=answer))
      exchanges -= 1
  return turns


def _pair(words, source, held):
  """A question with its answer, and with the answer to another question of the same kind."""
  while True:
    ask = _pick(source, (_translate, _continue, _choose, _add))
    asked, other = ask(words, source, held), ask(words, source, held)
    if asked and other and asked[1] != other[1]:
      return dict(messages=[dict(role="user", content=asked[0])], chosen=asked[1], rejected=other[1])


def _translate(words, source, held):
  """A fact in another language (English one time in three) -> the same fact in this one."""
  others = languages.LANGUAGES
  other = _words("eng_Latn" if source.random() < 0.33 else _pick(source, others).code)
  return _translated(words, other, source, held)


def _translated(words, other, source, held):
  target = other.languages.get(words.tag) or other.languages.get(words.tag.partition("_")[0])
  fact = _pick(source, _DRAWS)(source, held, _territory(source, held))
  question, answer = render(other, fact), render(words, fact)
  if other is words or not (target and question and answer):
    return None
  return f"{target}{other.colon}{question}", answer


def _continue(words, source, held):
  """Three lines of a pattern and the start of a fourth -> its end."""
  say = _pick(source, (_currency_of, _languages_of))
  known = {}
  for _ in range(40):
    territory = _territory(source, held)
    if territory in words.territories and (said := say(words, territory)):
      known[words.territories[territory]] = said
    if len(known) == 4:
      *lines, last = (f"{name}{words.colon}{said}" for name, said in known.items())
      name, said = list(known.items())[-1]
      return "\n".join((*lines, f"{name}{words.colon}".rstrip())), said
  return None


def _choose(words, source, held):
  """A multiple-choice item: a territory and four currencies or languages -> the right line."""
  say = _pick(source, (_currency_of, _languages_of))
  territory = _territory(source, held)
  name, right = words.territories.get(territory), say(words, territory)
  wrong = {say(words, _territory(source, held)) for _ in range(12)} - {right, None}
  if not name or not right or len(wrong) < 3:
    return None
  options = sorted(wrong)[:3]
  options.insert(_between(source, 0, 3), right)
  lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options)]
  return "\n".join((f"{name}{words.colon}?", *lines)), lines[options.index(right)]


def _add(words, source, held):
  """'3 days + 4 days =' -> '7 days', in units or in money."""
  one, two = _between(source, 1, 60), _between(source, 1, 60)
  kind, what = _pick(source, (("quantity", _UNITS), ("price", CURRENCIES)))
  what = _pick(source, what)
  said = [render(words, (kind, what, n)) for n in (one, two, one + two)]
  if None in said or any(held_out(kind, what, n) != held for n in (one, two, one + two)):
    return None
  return f"{said[0]} + {said[1]} =", said[2]


def _count_on(words, source, held):
  """Some days or months in order -> the next one."""
  del held  # the order of the days is no fact to hold out
  names = _pick(source, (words.days, words.months))
  start, count = _between(source, 0, len(names) - 1), _between(source, 2, 4)
  names = [names[(start + i) % len(names)] for i in range(count + 1)]
  return words.comma.join(names[:-1]) + words.comma.rstrip(), names[-1]


# --- facts: tuples of no language ---------------------------------------------------------------
# Each draws one fact of the wanted side, about the territory where it is about one.


def _draw_money(source, held, about):
  del source, held
  return "money", about


def _draw_spoken(source, held, about):
  del source, held
  return "spoken", about


def _draw_city(source, held, about):
  del held
  return "city", about, _pick(source, _zones()[about])


def _draw_shared(source, held, about):
  currency = _currencies()[about][0]
  same = tuple(t for t in _sides()[held] if _currencies()[t][0] == currency)
  return "shared", currency, _some(source, same, 2, 4)


def _draw_paid(source, held, about):
  currency = _currencies()[about][0]
  return _wanted(held, lambda: ("price", currency, _number(source)))


def _draw_price(source, held, about):
  del about
  return _wanted(held, lambda: ("price", _pick(source, CURRENCIES), _number(source)))


def _draw_quantity(source, held, about):
  del about
  return _wanted(held, lambda: ("quantity", _pick(source, _UNITS), _number(source)))


def _draw_date(source, held, about):
  del about
  styles = ("full", "full", "long", "medium")
  day = _wanted(held, lambda: ("date", _day(source)))[1]
  return "date", day, _pick(source, styles)


def _draw_interval(source, held, about):
  del about
  return _wanted(held, lambda: ("interval", _day(source), _between(source, 2, 80)))


def _draw_relative(source, held, about):
  del about
  spans = tuple(_SPANS)
  return _wanted(held, lambda: ("relative", _pick(source, spans), _between(source, -20, 20)))


def _draw_clock(source, held, about):
  del about
  hour, quarter = _between(source, 0, 23), _between(source, 0, 3)
  return _wanted(held, lambda: ("clock", _pick(source, ZONES), hour, 15 * quarter))


def _draw_compact(source, held, about):
  del about
  power = _between(source, 3, 9)
  return _wanted(held, lambda: ("compact", _between(source, 11, 99) * 10**power // 10))


def _draw_languages(source, held, about):
  del about
  return _pick(source, ("languages", "either")), _some(source, _tongues()[held], 2, 5)


def _draw_calendar(source, held, about):
  del held, about
  return _pick(source, ("days", "months")), _between(source, 0, 11), _between(source, 2, 5)


_ABOUT = (_draw_money, _draw_spoken, _draw_city, _draw_shared, _draw_paid)
_DRAWS = (
  *(_draw_money, _draw_spoken, _draw_city, _draw_shared, _draw_price, _draw_quantity),
  *(_draw_quantity, _draw_date, _draw_interval, _draw_relative, _draw_clock, _draw_compact),
  *(_draw_languages, _draw_languages, _draw_calendar),
)


def _wanted(held, draw):
  """The first drawn fact that lies on the wanted side."""
  while held_out(*(fact := draw())) != held:
    pass
  return fact


def _territory(source, held):
  return _pick(source, _sides()[held])


@functools.cache
def _sides():
  """{held: territories of that side}."""
  return {side: [t for t in TERRITORIES if held_out(t) == side] for side in (False, True)}


@functools.cache
def _tongues():
  """{held: languages of that side}."""
  return {side: [x for x in LANGUAGES if held_out("language", x) == side] for side in (False, True)}


def _day(source):
  return datetime.date.fromordinal(_between(source, 693_596, 767_009)).isoformat()  # 1900 to 2100


def _number(source):
  """Mostly small whole numbers, some with a decimal, some large."""
  n = _between(source, 1, 120)
  return _pick(source, (n, n, n + 0.5, n * 25))


# random.Random.random() alone is promised to stay the same across Python versions.
def _between(source, low, high):
  return low + int(source.random() * (high - low + 1))


def _pick(source, items):
  return items[int(source.random() * len(items))]


def _some(source, items, low, high):
  """`low` to `high` distinct items in random order (fewer if there are not so many)."""
  order = sorted((source.random(), item) for item in items)
  return tuple(item for _, item in order[: _between(source, low, high)])


# --- the world, from CLDR's supplemental data ---------------------------------------------------


@functools.cache
def _currencies():
  """{territory: its currencies in force}, the first being the main one."""
  found = {}
  for territory, entries in get_global("territory_currencies").items():
    current = [name for name, _, end, tender in entries if tender and end is None]
    if current and len(territory) == 2:
      found[territory] = current
  return found


@functools.cache
def _spoken():
  """{territory: up to four official languages, most spoken first}."""
  found = {}
  for territory, tongues in get_global("territory_languages").items():
    official = [
      (-facts["population_percent"], tongue)
      for tongue, facts in tongues.items()
      if (facts["official_status"] or "").endswith("official") and "_" not in tongue
    ]
    if official:
      found[territory] = tuple(tongue for _, tongue in sorted(official)[:4])
  return found


@functools.cache
def _zones():
  """{territory: its time zones}."""
  return {territory: tuple(zones) for territory, zones in get_global("territory_zones").items()}


TERRITORIES = tuple(sorted(_currencies().keys() & _spoken().keys() & _zones().keys()))
CURRENCIES = tuple(sorted({_currencies()[territory][0] for territory in TERRITORIES}))
LANGUAGES = tuple(sorted(set(itertools.chain(*_spoken().values()))))
ZONES = tuple(sorted(set(get_global("meta_zones").values())))


# --- one language's words -----------------------------------------------------------------------


class Words(NamedTuple):
  """What CLDR knows of one language; a name it lacks is absent, never another language's."""

  code: str
  locale: babel.Locale
  tag: str
  own_name: str | None
  territories: dict
  currencies: dict
  languages: dict
  cities: dict
  months: list
  days: list
  zones: dict
  stop: str
  colon: str
  comma: str


@functools.cache
def _words(code):
  language = languages.find(code)
  tag = _LOCALES.get(code, language.iso)
  locale = _locale(tag)
  return Words(
    code=code,
    locale=locale,
    tag=tag,
    own_name=locale.languages.get(tag) or locale.languages.get(locale.language),
    territories={t: locale.territories[t] for t in TERRITORIES if t in locale.territories},
    currencies=_named(locale, "currencies", lambda names: names),
    languages=_named(locale, "languages", lambda names: names),
    cities=_cities(locale, language.script),
    months=[locale.months["stand-alone"]["wide"][month] for month in range(1, 13)],
    days=[locale.days["stand-alone"]["wide"][day] for day in range(7)],
    zones=_named(locale, "meta_zones", _zone_names),
    stop=_STOPS.get(code, ". "),
    colon=_COLONS.get(code, ": "),
    comma=_COMMAS.get(code, ", "),
  )


@functools.cache
def _locale(tag):
  """A Babel locale whose data is its own.

  Babel 2.18 shares the dictionaries that a locale inherits with its parents, and writes into them
  when it first resolves an alias: French would then count the days of whichever language was asked
  before. So each locale's data is copied, in place, before anything reads it (and the root's is
  never read).
  """
  data = localedata.load(tag)
  own = copy.deepcopy(data)
  data.clear()
  data.update(own)
  return babel.Locale.parse(tag)


def _named(locale, what, names):
  """{key: name} but for English names of several words left untranslated ('Guyana Time')."""
  own, english = names(dict(getattr(locale, what))), names(dict(getattr(_locale("en"), what)))
  if locale.language == "en":
    return own
  return {key: name for key, name in own.items() if " " not in name or name != english.get(key)}


def _zone_names(zones):
  """Babel's meta_zones -> {zone: the long name of its standard time}."""
  long = {zone: names.get("long") or {} for zone, names in zones.items()}
  return {zone: names["standard"] for zone, names in long.items() if "standard" in names}


def _cities(locale, script):
  """{zone: its city}; CLDR leaves out a name that is spelt as in the zone's own, if Latin."""
  named = {zone: (locale.time_zones.get(zone) or {}).get("city") for zone in _every_zone()}
  if script == "Latn":
    named = {
      zone: city or zone.rpartition("/")[2].replace("_", " ") for zone, city in named.items()
    }
  return {zone: city for zone, city in named.items() if city}


def _every_zone():
  return sorted(set(itertools.chain(*_zones().values())))


# --- a fact in a language: str, or None where CLDR lacks a word for it --------------------------


def render(words, fact):
  """Says `fact` in the language of `words`; None where CLDR has no words of that language."""
  kind, *rest = fact
  said = _RENDER[kind](words, *rest)
  return unicodedata.normalize("NFC", said).strip() if said else None


def _money(words, territory):
  return _heading(words, territory, _currency_of(words, territory))


def _spoken_in(words, territory):
  return _heading(words, territory, _languages_of(words, territory))


def _heading(words, territory, said):
  name = words.territories.get(territory)
  return f"{name}{words.colon}{said}" if name and said else None


def _currency_of(words, territory):
  return words.currencies.get(_currencies()[territory][0])


def _languages_of(words, territory):
  return _listed(words, [words.languages.get(tongue) for tongue in _spoken()[territory]])


def _city(words, territory, zone):
  name, city = words.territories.get(territory), words.cities.get(zone)
  return f"{city}{words.comma}{name}" if name and city else None


def _shared(words, currency, territories):
  name = words.currencies.get(currency)
  shared = _listed(words, [words.territories.get(territory) for territory in territories])
  return f"{name}{words.colon}{shared}" if name and shared else None


def _price(words, currency, number):
  if currency not in words.currencies:
    return None
  return numbers.format_currency(
    number, currency, locale=words.locale, format_type="name", currency_digits=False
  )


def _quantity(words, unit, number):
  said = units.format_unit(number, unit, "long", locale=words.locale)
  return None if unit in said else said  # Babel writes the unit's id where CLDR has no pattern


def _date(words, day, style):
  return dates.format_date(datetime.date.fromisoformat(day), style, words.locale)


def _interval(words, day, days):
  start = datetime.date.fromisoformat(day)
  end = start + datetime.timedelta(days=days)
  return dates.format_interval(start, end, "yMMMd", locale=words.locale)


def _relative(words, span, count):
  seconds = datetime.timedelta(seconds=count * _SPANS[span])
  keywords = dict(granularity=span, threshold=1e9, add_direction=True)
  said = dates.format_timedelta(seconds, locale=words.locale, **keywords)
  return None if said.startswith(("+", "-")) else said  # '+5 d' where CLDR has no words


def _clock(words, zone, hour, minute):
  time = dates.format_time(datetime.time(hour, minute), "short", locale=words.locale)
  return f"{time} {words.zones[zone]}" if zone in words.zones else None


def _compact(words, number):
  if "long" not in words.locale.compact_decimal_formats or words.code == "wol_Latn":
    return None  # Wolof's are English abbreviations
  return numbers.format_compact_decimal(
    number, format_type="long", locale=words.locale, fraction_digits=1
  )


def _listed_languages(words, tongues):
  return _listed(words, [words.languages.get(tongue) for tongue in tongues])


def _either_language(words, tongues):
  if words.code != "eng_Latn" and " or " in words.locale.list_patterns["or"]["end"]:
    return None  # CLDR has no 'or' here, and the root's is English
  return _listed(words, [words.languages.get(tongue) for tongue in tongues], "or")


def _listed_days(words, start, count):
  return _listed(words, [words.days[(start + i) % 7] for i in range(count)])


def _listed_months(words, start, count):
  return _listed(words, [words.months[(start + i) % 12] for i in range(count)])


def _listed(words, names, style="standard"):
  """'A, B and C'; None unless all of the names are known: part of a fact is another fact."""
  names = list(dict.fromkeys(names))
  return lists.format_list(names, style, words.locale) if all(names) else None


_RENDER = dict(
  money=_money,
  spoken=_spoken_in,
  city=_city,
  shared=_shared,
  price=_price,
  quantity=_quantity,
  date=_date,
  interval=_interval,
  relative=_relative,
  clock=_clock,
  compact=_compact,
  languages=_listed_languages,
  either=_either_language,
  days=_listed_days,
  months=_listed_months,
)
