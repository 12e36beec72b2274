"""Raw text in, documents out, and a sentence with the place for everything malformed."""

import gzip
import json

import pytest

from tiny_aya_jax import run
from tiny_aya_jax.data import text, toy


def conversation(*roles):
  return [dict(role=role, content=f"{role} says {i}") for i, role in enumerate(roles)]


def write(path, *records):
  """Writes text, or records as JSON lines; compressed if the name says so."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
  data = "\n".join(lines).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return path


def everything(source):
  found = text.languages(source)
  return {
    (code, name): list(text.read(source, code, name)) for code in found for name in found[code]
  }


def test_flat_files_and_folders_with_and_without_sources_are_read_in_the_tables_order(tmp_path):
  write(tmp_path / "wol_Latn.txt.gz", "one")
  write(tmp_path / "fra_Latn" / "wiki" / "b.txt", "three")
  write(tmp_path / "fra_Latn" / "wiki" / "a.jsonl.gz", dict(text="two"))
  write(tmp_path / "fra_Latn" / "x.txt", "four")
  write(tmp_path / "eng_Latn.jsonl", dict(text="five", lang="ignored"))
  found = everything(tmp_path)
  assert list(found) == [
    ("eng_Latn", "text"),
    ("fra_Latn", "text"),
    ("fra_Latn", "wiki"),
    ("wol_Latn", "text"),
  ]
  assert found["fra_Latn", "wiki"] == ["two", "three"]
  assert found["eng_Latn", "text"] == ["five"]


def test_a_blank_line_ends_a_document_whatever_the_line_ends(tmp_path):
  raw = "\ufeffone\r\ntwo  \r\n \t\r\n\r\n\r\n  three\n\nfour\u2028five\n\n"
  (tmp_path / "eng_Latn.txt").write_bytes(raw.encode())
  assert list(text.read(tmp_path, "eng_Latn", "text")) == [
    "one\ntwo  ",
    "  three",
    "four\u2028five",
  ]


def test_aliases_are_read_as_the_canonical_code_and_joined_with_it(tmp_path, capsys):
  write(tmp_path / "est_Latn.txt", "one")
  write(tmp_path / "ekk_Latn.txt", "two")
  write(tmp_path / "yue_Hant.txt", "three")
  write(tmp_path / "cmn_Hani.txt", "four")
  text._first.cache_clear()
  found = everything(tmp_path)
  assert sorted(found["ekk_Latn", "text"]) == ["one", "two"]
  assert found["yue_Hani", "text"] == ["three"]
  assert found["cmn_Hans", "text"] == ["four"]
  assert capsys.readouterr().out.count("all of it is read as cmn_Hans") == 1


def test_records_that_name_their_language_are_sorted_out(tmp_path):
  write(
    tmp_path / "chat.jsonl.gz",
    dict(lang="fra_Latn", messages=conversation("user", "assistant")),
    dict(lang="de", text="Es steht de und fra_Latn darin"),
    dict(language="Norwegian Bokmål", text="fjell"),
    "",
    dict(lang="fr", text="deux"),
  )
  found = everything(tmp_path)
  assert found == {
    ("fra_Latn", "chat"): [conversation("user", "assistant"), "deux"],
    ("deu_Latn", "chat"): ["Es steht de und fra_Latn darin"],
    ("nob_Latn", "chat"): ["fjell"],
  }


def test_a_label_written_with_json_escapes_is_the_same_label(tmp_path):
  write(tmp_path / "mix.jsonl", dict(text="one", lang="eng_Latn"),
        '{"text": "two", "lang": "\\u0065ng_Latn"}', dict(text="three", lang="fra_Latn"))
  assert everything(tmp_path)["eng_Latn", "mix"] == ["one", "two"]


def test_a_link_to_nothing_and_a_name_that_is_no_text_are_refused(tmp_path):
  (tmp_path / "eng_Latn.txt").symlink_to(tmp_path / "gone")
  with pytest.raises(run.Refused, match="a link to nothing"):
    text.languages(tmp_path)
  (tmp_path / "eng_Latn.txt").unlink()
  (tmp_path / "a\udcff.jsonl").touch()
  with pytest.raises(run.Refused, match="bytes that are no UTF-8"):
    text.languages(tmp_path)
  (tmp_path / "a\udcff.jsonl").unlink()
  write(tmp_path / "fas_Arab" / "\u06af\u0641\u062a\u200c\u0648\u06af\u0648.txt", "fine")
  assert everything(tmp_path) == {("fas_Arab", "text"): ["fine"]}


def test_code_is_a_language_here(tmp_path):
  write(tmp_path / "code" / "python" / "a.jsonl", dict(text="x = 1"))
  assert everything(tmp_path) == {("code", "python"): ["x = 1"]}


def test_other_files_are_ignored_and_empty_documents_skipped(tmp_path):
  for name in ("INDEX.tsv", "README.md", "README", ".hidden.txt", "notes/draft.md"):
    write(tmp_path / name, "nothing")
  write(tmp_path / "eng_Latn.jsonl", dict(text=" \n"), "", dict(text="one"))
  assert everything(tmp_path) == {("eng_Latn", "text"): ["one"]}


def test_chatbot_is_an_assistant_and_other_fields_are_left_out(tmp_path):
  messages = [dict(turn, id=7) for turn in conversation("system", "user", "chatbot")]
  write(tmp_path / "eng_Latn.jsonl", dict(messages=messages))
  (read,) = text.read(tmp_path, "eng_Latn", "text")
  assert [turn["role"] for turn in read] == ["system", "user", "assistant"]
  assert all(set(turn) == {"role", "content"} for turn in read)


@pytest.mark.parametrize(
  "roles",
  [
    ("assistant", "user"),
    ("user", "user"),
    ("system",),
    ("user", "assistant", "system", "user"),
    ("system", "assistant"),
  ],
)
def test_a_conversation_that_does_not_alternate_is_refused_with_its_roles(tmp_path, roles):
  write(tmp_path / "eng_Latn.jsonl", dict(text="fine"), dict(messages=conversation(*roles)))
  with pytest.raises(run.Refused, match="line 2.*" + ", ".join(roles)):
    everything(tmp_path)


@pytest.mark.parametrize(
  ("record", "words"),
  [
    ("{not json", "line 2 is not JSON"),
    ("[1]", "line 2 is a JSON list"),
    ('{"text": ' + 5000 * "9" + "}", "line 2 is not JSON"),
    (100_000 * "[", "line 2 is not JSON"),
    (dict(messages=[dict(role=["user"], content="x")]), r"unknown role in .* \['user'\]"),
    (dict(words="x"), "line 2 has the fields 'words'"),
    (dict(text="x", messages=[]), "exactly one of 'text' and 'messages'"),
    (dict(text=7), "'text' is a int"),
    (dict(messages=[]), "expected a list"),
    (dict(messages=["x"]), "message 1 is 'x'"),
    (dict(messages=[dict(role="asistant", content="")]), "did you mean 'assistant'"),
    (dict(messages=[dict(role="user", content=None)]), "'content' is a NoneType"),
    ('{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
  ],
)
def test_a_malformed_record_is_refused_with_its_line(tmp_path, record, words):
  write(tmp_path / "eng_Latn.jsonl", dict(text="fine"), record)
  with pytest.raises(run.Refused, match=words):
    everything(tmp_path)


@pytest.mark.parametrize("name", ["eng_Latn.txt", "eng_Latn.txt.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_is_refused_with_file_line_and_byte(tmp_path, name, mark):
  for before in (b"", "drei f\u00fcnf\r\n\n".encode()):
    data = mark + before + b"abc\xff"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    line, offset = 1 + before.count(b"\n"), len(data) - 1
    with pytest.raises(run.Refused, match=rf"{name}, line {line}: byte {offset} \(0xff\)"):
      everything(tmp_path)


def test_a_damaged_or_cut_gzip_is_refused(tmp_path):
  data = gzip.compress("\n\n".join(map(str, range(5000))).encode())
  for broken in (data[:-20], b"no gzip", data[:100] + b"\0\0\0\0" + data[104:]):
    (tmp_path / "eng_Latn.txt.gz").write_bytes(broken)
    with pytest.raises(run.Refused, match="damaged or cut short"):
      everything(tmp_path)


def test_zstandard_frames_are_all_read_and_a_cut_one_is_refused(tmp_path):
  zstandard = pytest.importorskip("zstandard")
  frames = [zstandard.compress(words.encode()) for words in ("one\n\ntw", "o\n\nthree")]
  path = tmp_path / "eng_Latn.txt.zst"
  path.write_bytes(b"".join(frames))
  assert everything(tmp_path) == {("eng_Latn", "text"): ["one", "two", "three"]}
  path.write_bytes(b"".join(frames)[:-3])
  with pytest.raises(run.Refused, match="damaged or cut short"):
    everything(tmp_path)


def test_zstandard_without_its_package_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(text, "zstandard", None)
  write(tmp_path / "eng_Latn.txt.zst", "x")
  with pytest.raises(run.Refused, match="pip install zstandard"):
    everything(tmp_path)


@pytest.mark.parametrize("name", ["fra_Latin.txt", "fra_Latin.jsonl", "fra_Latin/wiki/a.txt"])
def test_a_text_file_that_names_no_language_is_refused_with_the_nearest(tmp_path, name):
  write(tmp_path / name, dict(text="x"))
  with pytest.raises(run.Refused, match="did you mean 'fra_Latn'"):
    text.languages(tmp_path)


def test_a_record_of_an_unknown_language_is_refused_with_its_line(tmp_path):
  write(tmp_path / "chat.jsonl", dict(lang="fr", text="x"), dict(lang="fra_Latin", text="x"))
  with pytest.raises(run.Refused, match="line 2: unknown language 'fra_Latin'.*'fra_Latn'"):
    text.languages(tmp_path)


def test_a_folder_inside_a_source_is_refused(tmp_path):
  write(tmp_path / "fra_Latn" / "wiki" / "2024" / "a.txt", "x")
  with pytest.raises(run.Refused, match="a folder inside a source"):
    text.languages(tmp_path)


def test_a_missing_or_empty_or_remote_folder_and_a_file_are_refused(tmp_path):
  (tmp_path / "empty").mkdir()
  write(tmp_path / "file.txt", "x")
  for source, words in (
    (tmp_path / "nowhere", "nowhere does not exist"),
    (tmp_path / "empty", "empty holds no text"),
    (tmp_path / "file.txt", "is a file"),
    ("gs://bucket/text", "is remote"),
    ("embedded/trian", "did you mean 'train'"),
  ):
    with pytest.raises(run.Refused, match=words):
      text.languages(source)


def test_an_unknown_language_or_source_of_a_folder_is_refused(tmp_path):
  write(tmp_path / "fra_Latn" / "wiki" / "a.txt", "x")
  with pytest.raises(run.Refused, match="did you mean 'fra_Latn'"):
    next(text.read(tmp_path, "fra_Latin", "wiki"))
  with pytest.raises(run.Refused, match="did you mean 'wiki'"):
    next(text.read(tmp_path, "fra_Latn", "wikis"))


def test_a_file_is_streamed_and_not_read_whole(tmp_path):
  # The bad byte behind is met only after the documents before it were given out.
  path = tmp_path / "eng_Latn.txt"
  path.write_bytes(b"one\n\ntwo\n\n" + b"\xff")
  documents = text.read(tmp_path, "eng_Latn", "text")
  assert [next(documents), next(documents)] == ["one", "two"]
  with pytest.raises(run.Refused):
    next(documents)


def test_a_changed_file_is_scanned_again(tmp_path):
  write(tmp_path / "chat.jsonl", dict(lang="fr", text="x"))
  assert list(text.languages(tmp_path)) == ["fra_Latn"]
  write(tmp_path / "chat.jsonl", dict(lang="fr", text="x"), dict(lang="de", text="x"))
  assert list(text.languages(tmp_path)) == ["fra_Latn", "deu_Latn"]


def test_the_embedded_corpus_reads_like_a_folder():
  found = text.languages("embedded/validation")
  assert len(found) == 70
  assert found["gle_Latn"] == {"cldr": []}
  assert list(text.read("embedded/validation", "gle_Latn", "cldr")) == list(
    toy.documents("gle_Latn", "validation")
  )
