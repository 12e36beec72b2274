"""The 70 languages as data: code, names, script, family, region, released models, web size.

Not a language identifier and not a mixture: only facts, and the names people call them by. Order,
names, families, regions and sizes follow the report's language table and FineWeb-2.

`fineweb_bytes` is UTF-8 bytes of FineWeb-2's train split, with two stated proxies:
- English is not in FineWeb-2. FineWeb holds 15e12 GPT-2 tokens (arXiv 2406.17557), and GPT-2 spends
  one token on about 4.67 bytes of it (measured on FineWeb-Edu in nanochat's tokenizer report), so
  70e12 bytes, good to two digits at best.
- Chinese is one subset, cmn_Hani, of 2,665,362,545,414 bytes, counted once: 73.9% to cmn_Hans and
  the rest to cmn_Hant, CC-100's ratio of 46.9 to 16.6 GiB (XLM-R, arXiv 1911.02116, appendix A).
"""

from typing import NamedTuple

from tiny_aya_jax import run


class Language(NamedTuple):
  """One row of the table."""

  code: str  # unique; FineWeb-2's, but for the two Chinese scripts
  iso: str  # ISO 639-1 where there is one (the report's), else 639-3
  name: str
  script: str  # ISO 15924, as FineWeb-2 writes it (Hani for all Chinese)
  family: str  # FineWeb-2's
  genus: str  # ours: the report gives none
  region: str  # one of REGIONS
  released: tuple  # released models whose post-training mix covers the language
  fineweb_bytes: int
  aliases: tuple  # other codes and names that mean exactly this language
  confusable: tuple  # labels a language identifier may give to text truly in this language


# region -> regional models (report section 3.2: fire = South Asia; water = Europe, West Asia and
# Asia Pacific; earth = Europe, West Asia and Africa). `global` covers all; English is in every mix.
REGIONS = {
  "Europe": ("earth", "water"),
  "West Asia": ("earth", "water"),
  "South Asia": ("fire",),
  "Asia Pacific": ("water",),
  "Africa": ("earth",),
}

# code | iso | name | family | genus | bytes
_TABLE = """
[Europe]
eng_Latn | en  | English               | Indo-European    | Germanic      | 70_000_000_000_000
nld_Latn | nl  | Dutch                 | Indo-European    | Germanic      |    426_818_652_448
fra_Latn | fr  | French                | Indo-European    | Romance       |  1_220_202_265_605
ita_Latn | it  | Italian               | Indo-European    | Romance       |    793_750_885_035
por_Latn | pt  | Portuguese            | Indo-European    | Romance       |    611_213_407_211
ron_Latn | ro  | Romanian              | Indo-European    | Romance       |    199_920_561_455
spa_Latn | es  | Spanish               | Indo-European    | Romance       |  1_447_166_708_770
ces_Latn | cs  | Czech                 | Indo-European    | Slavic        |    221_544_258_565
pol_Latn | pl  | Polish                | Indo-European    | Slavic        |    463_862_082_709
ukr_Cyrl | uk  | Ukrainian             | Indo-European    | Slavic        |    273_654_962_631
rus_Cyrl | ru  | Russian               | Indo-European    | Slavic        |  6_400_108_560_340
ell_Grek | el  | Greek                 | Indo-European    | Hellenic      |    238_423_993_714
deu_Latn | de  | German                | Indo-European    | Germanic      |  1_654_784_757_688
dan_Latn | da  | Danish                | Indo-European    | Germanic      |    161_837_584_891
swe_Latn | sv  | Swedish               | Indo-European    | Germanic      |    217_929_329_252
nob_Latn | no  | Norwegian Bokmål      | Indo-European    | Germanic      |    184_736_905_731
cat_Latn | ca  | Catalan               | Indo-European    | Romance       |     43_330_701_751
glg_Latn | gl  | Galician              | Indo-European    | Romance       |      6_947_044_419
cym_Latn | cy  | Welsh                 | Indo-European    | Celtic        |      2_680_853_098
gle_Latn | ga  | Irish                 | Indo-European    | Celtic        |      2_330_152_361
eus_Latn | eu  | Basque                | Language isolate | Basque        |      4_616_894_404
hrv_Latn | hr  | Croatian              | Indo-European    | Slavic        |     38_555_062_999
lvs_Latn | lv  | Latvian               | Indo-European    | Baltic        |     35_823_658_462
lit_Latn | lt  | Lithuanian            | Indo-European    | Baltic        |     60_666_590_655
slk_Latn | sk  | Slovak                | Indo-European    | Slavic        |     91_733_828_860
slv_Latn | sl  | Slovenian             | Indo-European    | Slavic        |     44_878_788_376
ekk_Latn | et  | Estonian              | Uralic           | Finnic        |     43_834_195_267
fin_Latn | fi  | Finnish               | Uralic           | Finnic        |    153_578_789_445
hun_Latn | hu  | Hungarian             | Uralic           | Ugric         |    214_420_647_030
srp_Cyrl | sr  | Serbian               | Indo-European    | Slavic        |     28_846_157_665
bul_Cyrl | bg  | Bulgarian             | Indo-European    | Slavic        |    156_496_753_428
[West Asia]
arb_Arab | ar  | Arabic                | Afro-Asiatic     | Semitic       |    315_241_517_028
fas_Arab | fa  | Persian               | Indo-European    | Iranian       |    327_079_306_116
tur_Latn | tr  | Turkish               | Turkic           | Oghuz         |    305_497_429_770
mlt_Latn | mt  | Maltese               | Afro-Asiatic     | Semitic       |      1_642_185_804
heb_Hebr | he  | Hebrew                | Afro-Asiatic     | Semitic       |     73_780_962_340
[South Asia]
hin_Deva | hi  | Hindi                 | Indo-European    | Indo-Aryan    |    129_902_413_849
mar_Deva | mr  | Marathi               | Indo-European    | Indo-Aryan    |     24_237_886_861
ben_Beng | bn  | Bengali               | Indo-European    | Indo-Aryan    |     93_456_224_217
guj_Gujr | gu  | Gujarati              | Indo-European    | Indo-Aryan    |     12_573_380_396
pan_Guru | pa  | Punjabi               | Indo-European    | Indo-Aryan    |      6_050_581_322
tam_Taml | ta  | Tamil                 | Dravidian        | Dravidian     |     39_693_515_188
tel_Telu | te  | Telugu                | Dravidian        | Dravidian     |     15_478_493_847
npi_Deva | ne  | Nepali                | Indo-European    | Indo-Aryan    |     26_982_905_157
urd_Arab | ur  | Urdu                  | Indo-European    | Indo-Aryan    |     21_400_072_163
[Asia Pacific]
fil_Latn | tl  | Tagalog               | Austronesian     | Philippine    |      8_728_698_096
zsm_Latn | ms  | Malay                 | Austronesian     | Malayic       |     34_291_909_291
ind_Latn | id  | Indonesian            | Austronesian     | Malayic       |    374_364_271_538
vie_Latn | vi  | Vietnamese            | Austro-Asiatic   | Vietic        |    343_416_915_256
jav_Latn | jv  | Javanese              | Austronesian     | Javanese      |        821_367_191
khm_Khmr | km  | Khmer                 | Austro-Asiatic   | Khmeric       |      9_341_656_291
tha_Thai | th  | Thai                  | Kra-Dai          | Tai           |    299_226_473_998
lao_Laoo | lo  | Lao                   | Kra-Dai          | Tai           |      2_327_641_306
cmn_Hans | zh  | Chinese (Simplified)  | Sino-Tibetan     | Sinitic       |  1_969_702_921_061
cmn_Hant | zh  | Chinese (Traditional) | Sino-Tibetan     | Sinitic       |    695_659_624_353
yue_Hani | yue | Cantonese             | Sino-Tibetan     | Sinitic       |        673_769_606
mya_Mymr | my  | Burmese               | Sino-Tibetan     | Burmish       |     13_261_245_557
jpn_Jpan | ja  | Japanese              | Japonic          | Japonic       |  1_650_248_456_871
kor_Hang | ko  | Korean                | Koreanic         | Koreanic      |    229_164_863_492
[Africa]
amh_Ethi | am  | Amharic               | Afro-Asiatic     | Semitic       |      2_675_147_230
hau_Latn | ha  | Hausa                 | Afro-Asiatic     | Chadic        |      1_388_541_923
ibo_Latn | ig  | Igbo                  | Niger-Congo      | Volta-Niger   |        396_446_133
plt_Latn | mg  | Malagasy              | Austronesian     | Barito        |        963_914_602
sna_Latn | sn  | Shona                 | Niger-Congo      | Bantu         |        360_372_257
swh_Latn | sw  | Swahili               | Niger-Congo      | Bantu         |      3_311_669_706
wol_Latn | wo  | Wolof                 | Niger-Congo      | Senegambian   |         19_017_020
xho_Latn | xh  | Xhosa                 | Niger-Congo      | Bantu         |        796_963_469
yor_Latn | yo  | Yoruba                | Niger-Congo      | Volta-Niger   |        306_731_770
zul_Latn | zu  | Zulu                  | Niger-Congo      | Bantu         |        511_054_246
pcm_Latn | pcm | Nigerian Pidgin       | Creole           | English creole|          3_416_999
"""

# Codes and names in use elsewhere (FLORES, NLLB, macrolanguages, old ISO): true aliases only, so
# srp_Latn or nno_Latn are not here. The part before "_" counts too where it is unambiguous.
_ALIASES = dict(
  nob_Latn="nor nor_Latn nb Norwegian Bokmal",
  cym_Latn="Cymraeg",
  gle_Latn="Gaeilge",
  eus_Latn="Euskara",
  lvs_Latn="lav lav_Latn",
  slv_Latn="Slovene",
  ekk_Latn="est est_Latn",
  arb_Arab="ara ara_Arab",
  fas_Arab="pes pes_Arab Farsi",
  ben_Beng="Bangla",
  pan_Guru="Panjabi",
  npi_Deva="nep nep_Deva",
  fil_Latn="fil tgl tgl_Latn Filipino",
  zsm_Latn="msa msa_Latn",
  cmn_Hans="zho_Hans zh_Hans zh_CN",
  cmn_Hant="zho_Hant zh_Hant zh_TW",
  yue_Hani="yue_Hant",
  plt_Latn="mlg mlg_Latn",
  sna_Latn="chiShona",
  swh_Latn="swa swa_Latn Kiswahili",
  xho_Latn="isiXhosa",
  zul_Latn="isiZulu",
  pcm_Latn="Naija",
)

# Labels py3langid 0.4.0 gives (1% or more of 250 lines of 60+ bytes a language, measured),
# and close relatives among its 142 labels. Wolof is not one of its labels: any answer is wrong.
_CONFUSABLE = dict(
  eng_Latn="pcm",
  nld_Latn="af",
  fra_Latn="oc",
  por_Latn="gl es",
  spa_Latn="gl ca pt",
  ces_Latn="sk",
  ukr_Cyrl="ru be",
  rus_Cyrl="uk be bg tg",
  ell_Grek="grc",
  dan_Latn="no nn sv",
  swe_Latn="da no nn",
  nob_Latn="da nn sv",
  cat_Latn="oc es",
  glg_Latn="pt es",
  hrv_Latn="bs sr sl",
  lvs_Latn="lt ltg",
  lit_Latn="lv ltg pl",
  slk_Latn="cs",
  slv_Latn="hr bs sr",
  ekk_Latn="fi",
  fin_Latn="et",
  srp_Cyrl="mk bg",
  bul_Cyrl="mk ru sr",
  arb_Arab="arz ary",
  fas_Arab="ur",
  tur_Latn="az tk",
  hin_Deva="mr ne sa",
  mar_Deva="hi ne sa gom",
  npi_Deva="hi mr sa",
  urd_Arab="fa",
  fil_Latn="bcl",
  zsm_Latn="id",
  ind_Latn="ms",
  jav_Latn="id ms su",
  tha_Thai="lo",
  lao_Laoo="th",
  cmn_Hans="wuu yue",
  cmn_Hant="wuu yue",
  yue_Hani="zh wuu",
  wol_Latn="fuv so om",
  xho_Latn="zu",
  yor_Latn="pcm",
  zul_Latn="xh",
  pcm_Latn="en yo",
)

# Names of more than one language: `expand` gives them all, `find` refuses them.
AMBIGUOUS = {
  name: ("cmn_Hans", "cmn_Hant")
  for name in ("cmn_Hani", "cmn", "zh", "zho", "zho_Hani", "chinese", "mandarin")
}

CODE = "code"  # program text: a pseudo-language of mixtures, not one of the 70


def find(name):
  """The Language called `name`: a code, alias, ISO code or English name, in any case.

  Refuses an unknown name with the nearest known one, and a name of two languages with both.
  """
  key = _key(name)
  if key in _AMBIGUOUS:
    codes = " and ".join(_AMBIGUOUS[key])
    raise run.Refused(f"language {name!r} means both {codes}: write one of them")
  if key in ("all", *map(_key, REGIONS)):
    raise run.Refused(f"{name!r} is a group of languages, and one language is expected here")
  if key not in _NAMES:
    raise run.Refused(f"unknown language {name!r}: {_nearest(name)}")
  return _NAMES[key]


def expand(name):
  """Codes meant by `name`, in table order: a language, 'zh', a region, 'all' or 'code'."""
  key = _key(name)
  if key == "all":
    return tuple(language.code for language in LANGUAGES)
  if key == CODE:
    return (CODE,)
  if key in _AMBIGUOUS:
    return _AMBIGUOUS[key]
  for region in REGIONS:
    if key == _key(region):
      return tuple(language.code for language in LANGUAGES if language.region == region)
  return (find(name).code,)


def select(names):
  """Codes meant by any of `names`, without repeats, in table order ('code' last)."""
  if isinstance(names, str):
    raise run.Refused(f"languages are a tuple of names, not one string: write ({names!r},)")
  if not names:
    raise run.Refused("languages are an empty tuple: name some, or ('all',)")
  chosen = {code for name in names for code in expand(name)}
  return tuple(code for code in (*(x.code for x in LANGUAGES), CODE) if code in chosen)


def _nearest(name):
  """'did you mean ...?', over codes and English names (the aliases would drown them)."""
  names = {_key(known): known for x in LANGUAGES for known in (x.code, x.name, *x.aliases)}
  names |= {_key(known): known for known in (*REGIONS, CODE, "all")}
  closest = run.nearest(_key(name), names)
  for key, known in names.items():
    closest = closest.replace(repr(key), repr(known))
  if closest.startswith("expected"):
    return "expected a code such as 'fra_Latn', an English name or a region (see languages.py)"
  return closest


def _key(name):
  """'zh-Hans', 'zh_hans' and 'ZH_Hans' are one name."""
  return str(name).strip().replace("-", "_").casefold()


def _languages():
  region = None
  for line in _TABLE.strip().splitlines():
    if line.startswith("["):
      region = line.strip("[]")
      continue
    code, iso, name, family, genus, size = (cell.strip() for cell in line.split("|"))
    regional = ("earth", "fire", "water") if code == "eng_Latn" else REGIONS[region]
    yield Language(
      code=code,
      iso=iso,
      name=name,
      script="Hani" if code.startswith("cmn_") else code.partition("_")[2],
      family=family,
      genus=genus,
      region=region,
      released=("global", *regional),
      fineweb_bytes=int(size),
      aliases=tuple(_ALIASES.get(code, "").split()),
      confusable=tuple(_CONFUSABLE.get(code, "").split()),
    )


LANGUAGES = tuple(_languages())


def _names():
  """{key: Language}; exact names first, so that a shortened alias never takes another's name."""
  names = {}
  for language in LANGUAGES:
    for name in (language.code, language.iso, language.name, *language.aliases):
      names.setdefault(_key(name), language)
  for language in LANGUAGES:
    for name in (language.code, *language.aliases):
      names.setdefault(_key(name).partition("_")[0], language)
  return names


_NAMES = _names()
_AMBIGUOUS = {_key(name): codes for name, codes in AMBIGUOUS.items()}
