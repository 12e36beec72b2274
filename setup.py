"""pip install -e .  (extras: the keys of EXTRAS)"""

from setuptools import find_packages, setup

EXTRAS = dict(
    tpu=["jax[tpu]"],
    cuda=["jax[cuda13]"],
    # clean.py; what datatrove imports without asking for it, and what its URL filter needs, beside it.
    data=["datatrove==0.10.1", "regex", "pyyaml", "tldextract", "pyahocorasick", "fasteners",
          "py3langid", "pyarrow", "zstandard"],
    # jinja2 renders chat templates of strangers, in a sandbox that holds from that version on.
    export=["safetensors", "tokenizers", "gguf==0.19.0", "jinja2>=3.1.6"],
    # evaluate's tasks; lm-eval brings `datasets` for sets on the hub.
    eval=["lm-eval==0.4.13", "sacrebleu==2.6.0", "py3langid", "regex"],
    track=["tensorboardX"],
    report=["matplotlib"],
    gcp=["gcsfs"],
    sweep=["optuna"],
    test=["pytest", "pytest-xdist", "jinja2", "pyyaml", "zstandard"],
    # Installed first and by exactly this version: any range pulls gigabytes of CUDA.
    parity=["torch==2.13.0", "transformers==5.17.0", "accelerate"],
)

setup(
    name="tiny_aya_jax",
    version="0.1.0",
    description="Tiny Aya in JAX: pretraining to export of a multilingual model in 70 languages",
    python_requires=">=3.11",
    packages=find_packages(include=["tiny_aya_jax", "tiny_aya_jax.*"]),
    install_requires=[
        "jax>=0.10.2,<0.13",  # the newest on Python 3.11 is 0.10.2
        "flax>=0.12.8",
        "optax",
        "orbax-checkpoint==0.12.8",  # its v1 interface is experimental; only checkpoint.py uses it
        "grain",
        "sentencepiece",
        "ml-collections",
        "absl-py",
        "etils",
        "numpy",
        "rich",
        "Babel==2.18.0",  # the wiring corpus is its CLDR: another version is another corpus
    ],
    extras_require=EXTRAS,
    entry_points=dict(console_scripts=["tiny-aya=tiny_aya_jax.__main__:console"]),
)
