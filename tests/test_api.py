"""The interface that other parts and outside checks rely on (the decisions table): frozen.

A change here is a change of contract: do it on purpose, and say so.
"""

import dataclasses
import inspect

from tiny_aya_jax import axes, languages
from tiny_aya_jax.data import loader, mixture, tokenizer
from tiny_aya_jax.export import huggingface
from tiny_aya_jax.model import decode, losses, transformer
from tiny_aya_jax.post import merge
from tiny_aya_jax.train import checkpoint

FROZEN = {
    axes.mesh: "data fsdp tensor context devices",
    axes.shardings: "mesh tree",
    axes.shard: "x letters",
    transformer.TinyAya.__call__: "self token_BT segment_BT position_BT",
    transformer.logits: "params hidden_BTD cfg",
    losses.next_token: (
        "hidden_BTD embedding_VD target_BT weight_BT *logit_scale *z_loss *chunk"
    ),
    decode.generate: (
        "params cfg prompts *steps *stop_ids *temperature *top_p *seed *dtype *banned_ids"
    ),
    tokenizer.load: "path",
    mixture.weights: "sizes rule",
    mixture.plan: "sources rule",
    loader.Loader.__init__: "self plan seed batch process",
    loader.Loader.__getitem__: "self step",
    checkpoint.save: "workdir step items *keep",
    checkpoint.restore: "path abstract names",
    checkpoint.verify: "path",
    huggingface.write: "folder params cfg tokenizer *dtype *T *shard_bytes",
    huggingface.read: "folder",
    merge.merge: "models operator *base *weights *t *density *scale *trimming *normalize *seed",
    languages.find: "name",
}


def test_the_frozen_interface_has_not_moved():
  for function, expected in FROZEN.items():
    found = " ".join(
        ("*" if parameter.kind is parameter.KEYWORD_ONLY else "") + name
        for name, parameter in inspect.signature(function).parameters.items()
    )
    assert found == expected, function.__qualname__


def test_a_tokenizer_has_what_the_contract_names():
  for name in ("encode", "decode", "bytes_V", "sha256"):
    assert hasattr(tokenizer.Tokenizer, name) or name in tokenizer.Tokenizer.__init__.__code__.co_names


def test_the_model_is_made_from_a_config_alone():
  fields = transformer.TinyAya.__dataclass_fields__
  required = [name for name, field in fields.items() if field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING and name != "parent"]
  assert required == ["cfg"]
