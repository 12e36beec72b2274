"""GlobalMGSM: grade-school problems in 35 languages; prompts, and the number read from an answer.

No problems are in here, and no model: those are files and another's work. The report has 35
languages (section 4) and names its sources; these 35 are what the public release
CohereLabs/global-mgsm and our table of 70 have in common, as its users list it (the release also
has kn ky lg si st uz, which we have not; it has no Hindi, though the report names a Hindi source).

Facts: the keywords of MGSM's eleven languages and how a number is read and compared, both from
openai/simple-evals, mgsm_eval.py; each language's decimal and grouping marks (CLDR, by Babel).
Ours: the other 24 keywords and every prompt. They were written by a machine and no speaker of any
of the languages has checked them.
"""

import functools
import re
import unicodedata

from babel import Locale

from tiny_aya_jax import languages, run

# MGSM's eleven, simple-evals
KEYWORDS = dict(
  ben_Beng="উত্তর",
  deu_Latn="Antwort",
  eng_Latn="Answer",
  spa_Latn="Respuesta",
  fra_Latn="Réponse",
  jpn_Jpan="答え",
  rus_Cyrl="Ответ",
  swh_Latn="Jibu",
  tel_Telu="సమాధానం",
  tha_Thai="คำตอบ",
  cmn_Hans="答案",
)
# ours, not checked by speakers
KEYWORDS |= dict(
  amh_Ethi="መልስ",
  arb_Arab="الإجابة",
  cat_Latn="Resposta",
  ces_Latn="Odpověď",
  cym_Latn="Ateb",
  ell_Grek="Απάντηση",
  eus_Latn="Erantzuna",
  glg_Latn="Resposta",
  guj_Gujr="જવાબ",
  hau_Latn="Amsa",
  hun_Latn="Válasz",
  khm_Khmr="ចម្លើយ",
  kor_Hang="정답",
  mya_Mymr="အဖြေ",
  npi_Deva="उत्तर",
  sna_Latn="Mhinduro",
  srp_Cyrl="Одговор",
  tam_Taml="பதில்",
  urd_Arab="جواب",
  vie_Latn="Đáp án",
  wol_Latn="Tontu",
  xho_Latn="Impendulo",
  yor_Latn="Ìdáhùn",
  zul_Latn="Impendulo",
)

# "Solve it, your reasoning step by step first. On the last line only the keyword and the number in
# digits, nothing after it." Ours, not checked by speakers; {} is the keyword and a colon.
_INSTRUCTIONS = dict(
  amh_Ethi=(
    "ይህን ጥያቄ ፍታ፣ መጀመሪያም አስተሳሰብህን ደረጃ በደረጃ ጻፍ።",
    'በመጨረሻው መስመር ላይ "{}" እና ቁጥሩን በአሃዝ ብቻ ጻፍ፣ ከዚያ በኋላ ምንም አትጻፍ።',
  ),
  arb_Arab=(
    "حل هذه المسألة واكتب أولاً تفكيرك خطوة بخطوة.",
    'اكتب في السطر الأخير "{}" والعدد بالأرقام فقط، دون أي شيء بعده.',
  ),
  ben_Beng=(
    "এই সমস্যাটি সমাধান করুন এবং প্রথমে ধাপে ধাপে আপনার যুক্তি লিখুন।",
    'শেষ লাইনে শুধু "{}" এবং সংখ্যাটি অঙ্কে লিখুন, এর পরে আর কিছু লিখবেন না।',
  ),
  cat_Latn=(
    "Resol aquest problema i escriu primer el teu raonament pas a pas.",
    'A l\'última línia escriu només "{}" i el nombre en xifres, sense res després.',
  ),
  ces_Latn=(
    "Vyřeš tuto úlohu a nejprve napiš svůj postup krok za krokem.",
    'Na poslední řádek napiš jen "{}" a číslo číslicemi, za ním už nic.',
  ),
  cmn_Hans=(
    "请解答这道题，先逐步写出推理过程。",
    '最后一行只写"{}"和用数字表示的结果，后面不要再写任何内容。',
  ),
  cym_Latn=(
    "Datrysa'r broblem hon gan ysgrifennu dy resymu gam wrth gam yn gyntaf.",
    'Ar y llinell olaf ysgrifenna "{}" a\'r rhif mewn digidau yn unig, heb ddim ar ei ôl.',
  ),
  deu_Latn=(
    "Löse diese Aufgabe und schreibe zuerst deinen Lösungsweg Schritt für Schritt auf.",
    'Schreibe in die letzte Zeile nur "{}" und die Zahl in Ziffern, ohne etwas danach.',
  ),
  ell_Grek=(
    "Λύσε αυτό το πρόβλημα γράφοντας πρώτα τον συλλογισμό σου βήμα προς βήμα.",
    'Στην τελευταία γραμμή γράψε μόνο "{}" και τον αριθμό με ψηφία, χωρίς τίποτα μετά.',
  ),
  eng_Latn=(
    "Solve this problem and write out your reasoning step by step first.",
    'On the last line write only "{}" and the number in digits, with nothing after it.',
  ),
  eus_Latn=(
    "Ebatzi problema hau eta idatzi lehenik zure arrazoibidea urratsez urrats.",
    'Azken lerroan idatzi "{}" eta zenbakia zifraz bakarrik, ondoren ezer gabe.',
  ),
  fra_Latn=(
    "Résous ce problème en écrivant d'abord ton raisonnement étape par étape.",
    'Sur la dernière ligne, écris seulement "{}" et le nombre en chiffres, sans rien après.',
  ),
  glg_Latn=(
    "Resolve este problema e escribe primeiro o teu razoamento paso a paso.",
    'Na última liña escribe só "{}" e o número en cifras, sen nada despois.',
  ),
  guj_Gujr=(
    "આ દાખલો ઉકેલો અને પહેલાં તમારો તર્ક પગલાંવાર લખો.",
    'છેલ્લી લીટીમાં ફક્ત "{}" અને સંખ્યા અંકોમાં લખો, તેના પછી કંઈ ન લખો.',
  ),
  hau_Latn=(
    "Warware wannan tambayar, ka fara da rubuta tunaninka mataki-mataki.",
    'A layi na ƙarshe ka rubuta "{}" da adadin a lambobi kawai, kada ka ƙara komai a bayansa.',
  ),
  hun_Latn=(
    "Oldd meg ezt a feladatot, és először írd le a gondolatmenetedet lépésről lépésre.",
    'Az utolsó sorba csak ezt írd: "{}" és a szám számjegyekkel, utána semmi.',
  ),
  jpn_Jpan=(
    "この問題を解き、まず考え方を順を追って書いてください。",
    "最後の行には「{}」と数字だけを書き、その後には何も書かないでください。",
  ),
  khm_Khmr=(
    "ដោះស្រាយលំហាត់នេះ ហើយសរសេរការគិតជាជំហានៗជាមុនសិន។",
    'នៅបន្ទាត់ចុងក្រោយ សរសេរតែ "{}" និងចំនួនជាលេខ ដោយគ្មានអ្វីនៅខាងក្រោយឡើយ។',
  ),
  kor_Hang=(
    "이 문제를 풀되 먼저 풀이 과정을 단계별로 쓰세요.",
    '마지막 줄에는 "{}"과 숫자만 쓰고 그 뒤에는 아무것도 쓰지 마세요.',
  ),
  mya_Mymr=(
    "ဤပုစ္ဆာကို ဖြေရှင်းပြီး တွက်နည်းကို အဆင့်လိုက် အရင်ရေးပါ။",
    'နောက်ဆုံးစာကြောင်းတွင် "{}" နှင့် ကိန်းကို ဂဏန်းဖြင့်သာ ရေးပြီး နောက်တွင် ဘာမှမရေးပါနှင့်။',
  ),
  npi_Deva=(
    "यो समस्या हल गर्नुहोस् र पहिले आफ्नो तर्क चरणबद्ध रूपमा लेख्नुहोस्।",
    'अन्तिम पङ्क्तिमा "{}" र सङ्ख्या अङ्कमा मात्र लेख्नुहोस्, त्यसपछि केही नलेख्नुहोस्।',
  ),
  rus_Cyrl=(
    "Реши эту задачу, сначала записав рассуждение шаг за шагом.",
    'В последней строке напиши только "{}" и число цифрами, ничего после него.',
  ),
  sna_Latn=(
    "Gadzirisa dambudziko iri, utange nekunyora mafungiro ako nhanho nenhanho.",
    'Pamutsetse wekupedzisira nyora chete "{}" nenhamba nemadhijiti, pasina chimwe mushure mayo.',
  ),
  spa_Latn=(
    "Resuelve este problema y escribe primero tu razonamiento paso a paso.",
    'En la última línea escribe solo "{}" y el número en cifras, sin nada después.',
  ),
  srp_Cyrl=(
    "Реши овај задатак и прво напиши своје размишљање корак по корак.",
    'У последњем реду напиши само "{}" и број цифрама, без ичега после тога.',
  ),
  swh_Latn=(
    "Tatua swali hili na uandike kwanza hoja zako hatua kwa hatua.",
    'Kwenye mstari wa mwisho andika "{}" na namba kwa tarakimu tu, bila kitu kingine baada yake.',
  ),
  tam_Taml=(
    "இந்தக் கணக்கைத் தீர்த்து, முதலில் உங்கள் விளக்கத்தைப் படிப்படியாக எழுதுங்கள்.",
    'கடைசி வரியில் "{}" மற்றும் எண்ணை இலக்கங்களில் மட்டும் எழுதுங்கள், பிறகு எதுவும் வேண்டாம்.',
  ),
  tel_Telu=(
    "ఈ లెక్కను చేసి, ముందుగా మీ ఆలోచనను దశలవారీగా రాయండి.",
    'చివరి వరుసలో "{}" మరియు సంఖ్యను అంకెలలో మాత్రమే రాయండి, దాని తర్వాత ఏమీ రాయవద్దు.',
  ),
  tha_Thai=(
    "แก้โจทย์ข้อนี้โดยเขียนวิธีคิดทีละขั้นก่อน",
    'บรรทัดสุดท้ายให้เขียนเพียง "{}" กับจำนวนเป็นตัวเลข โดยไม่มีอะไรต่อท้าย',
  ),
  urd_Arab=(
    "اس سوال کو حل کریں اور پہلے اپنا استدلال قدم بہ قدم لکھیں۔",
    'آخری سطر میں صرف "{}" اور عدد ہندسوں میں لکھیں، اس کے بعد کچھ نہ لکھیں۔',
  ),
  vie_Latn=(
    "Hãy giải bài toán này và trước hết viết lập luận từng bước.",
    'Ở dòng cuối chỉ viết "{}" và con số bằng chữ số, không viết gì sau đó.',
  ),
  wol_Latn=(
    "Saafaral laaj bii te nga njëkk bind sa xalaat jéego ba jéego.",
    'Ci rëdd bu mujj bi bindal "{}" ak lim bi ci siifar rekk, te bul def dara ci ginnaawam.',
  ),
  xho_Latn=(
    "Sombulula le ngxaki, uqale ngokubhala indlela ocinga ngayo inyathelo ngenyathelo.",
    'Kumgca wokugqibela bhala kuphela "{}" nenani ngeedijithi, kungabikho nto emva kwalo.',
  ),
  yor_Latn=(
    "Yanjú ìṣòro yìí, kí o sì kọ́kọ́ kọ àlàyé rẹ ní ìgbésẹ̀ kọ̀ọ̀kan.",
    'Ní ìlà tó kẹ́yìn kọ "{}" àti iye náà ní nọ́ńbà nìkan, láìsí ohunkóhun lẹ́yìn rẹ̀.',
  ),
  zul_Latn=(
    "Xazulula le nkinga, uqale ngokubhala indlela ocabanga ngayo isinyathelo ngesinyathelo.",
    'Emgqeni wokugcina bhala kuphela "{}" nenombolo ngamadijithi, kungabi lutho ngemva kwayo.',
  ),
)

_NUMBER = re.compile(r"\d+\.?\d*")  # simple-evals; \d is a decimal digit of any script
# A minus sign is one only where nothing ends before it: "3-5" is no -5.
_SIGNED = re.compile(r"(?:(?<![\w)\]%])-)?\d+\.?\d*")
_GROUPING = "'’٬،，\u00a0\u202f\u2009"  # between groups of three these are no decimal mark anywhere
_THREES = r"[1-9]\d{{0,2}}(?:[{marks}]\d{{3}}){{{fewest},}}"


def prompt(question, code):
  """The question under two sentences in its language: reason first, then 'keyword: digits'.

  Raises Refused for a language that is not one of the 35.
  """
  instruction = " ".join(_INSTRUCTIONS[_known(code)])
  return f"{instruction.format(KEYWORDS[code] + ':')}\n\n{question}"


def extract(answer, code, strict=False):
  """The last number after the answer's last keyword, in ASCII digits; '' if either is missing.

  'Answer: 1,234.' -> '1234';   'Antwort: 1.234,50 €' -> '1234.50';   'उत्तर: १८' -> '18'
  `strict` is simple-evals' parse_answer to the letter: case matters, commas vanish, a point and
  digits after it are decimals. Without it, six things differ on purpose:
  - the keyword is found in any Unicode normal form (Vietnamese and Yoruba have several)
  - decimal digits of every script are read; ² and 十 are none
  - a minus sign, - or U+2212, counts directly before the number and after no letter or digit
  - groups of three lose their apostrophes, no-break spaces and Arabic or fullwidth commas; plain
    spaces only where CLDR groups with a space (Czech, French, Hungarian, Russian, Xhosa)
  - points group by threes where the decimal mark is a comma ('1.234' in German: answers are whole
    numbers, so no other reading can be right), elsewhere only in twos or more ('1.234.567')
  - a comma before one or two last digits is a decimal mark where CLDR says so, and anywhere behind
    grouping points; U+066B always is one. All other commas vanish, Indian groups' among them
  """
  keyword = KEYWORDS[_known(code)]
  if not strict:
    answer, keyword = (unicodedata.normalize("NFC", text) for text in (answer, keyword))
  *before, after = answer.split(keyword)
  if not before:
    return ""
  number = _NUMBER if strict else _SIGNED
  found = number.findall((after if strict else _plain(after, code)).replace(",", ""))
  return found[-1].rstrip(".") if found else ""


def correct(answer, expected, code, strict=False):
  """Whether the extracted number is `expected`, as text: '18.00' is '18', and '018' is not.

  As simple-evals' score_mgsm compares: zeros behind a point are dropped, expected's commas too.
  """
  found = extract(answer, code, strict)
  if "." in found:
    found = found.rstrip("0").rstrip(".")
  return found == str(expected).replace(",", "")


def _known(code):
  return run.choose("GlobalMGSM language", code, KEYWORDS)


def _plain(text, code):
  """Digits, signs and decimal points in ASCII; what only groups digits is gone, commas apart."""
  text = "".join(map(_ascii, text))
  decimal_comma, grouping_space = _marks(code)
  text = _join(text, _GROUPING + " " * grouping_space, fewest=1)
  behind_points = _THREES.format(marks=".", fewest=1)
  text = re.sub(
    rf"(?<![\d.,])({behind_points}),(\d{{1,2}})(?!\d|[.,]\d)",
    lambda match: f"{match[1].replace('.', '')}.{match[2]}",
    text,
  )
  text = _join(text, ".", fewest=1 if decimal_comma else 2)
  if decimal_comma:
    text = re.sub(r"(?<![\d.,])(\d+),(\d{1,2})(?!\d|[.,]\d)", r"\1.\2", text)
  return text


def _ascii(character):
  if character == "\u2212":
    return "-"
  if character == "\u066b":
    return "."
  return str(unicodedata.decimal(character, character))


def _join(text, marks, fewest):
  """'1 234 567' -> '1234567': groups of three behind at least `fewest` of the marks."""
  groups = _THREES.format(marks=marks, fewest=fewest)
  whole = rf"(?<![\d.,]){groups}(?!\d|[{marks}]\d)"  # all of it, or it is no grouping
  return re.sub(whole, lambda match: re.sub(f"[{marks}]", "", match[0]), text)


@functools.cache
def _marks(code):
  """CLDR: whether the language's decimal mark is a comma, and whether it groups with a space."""
  symbols = Locale.parse(languages.find(code).iso).number_symbols["latn"]
  return symbols["decimal"] == ",", symbols["group"].isspace()
