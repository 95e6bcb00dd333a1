"""The sizes and token ids of a Moondream2 checkpoint, read from its config.json.

Defaults are those of `vikhyatk/moondream2`, revision 2025-06-21. A hub config carries them under "config" (empty there:
all defaults), a local one at top level; any subset is accepted and unknown keys are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import WeightsMismatch

MAX_SIZE = 2**31
Section = TypeVar("Section")


@dataclass(frozen=True)
class TextConfig:
    dim: int = 2048
    ff_dim: int = 8192
    n_layers: int = 24
    vocab_size: int = 51200
    max_context: int = 2048
    n_heads: int = 32
    n_kv_heads: int = 32

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads  # 64

    @property
    def rotary_dim(self) -> int:
        return self.head_dim // 2  # 32

    @property
    def qkv_dim(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True)
class VisionConfig:
    enc_dim: int = 1152
    enc_patch_size: int = 14
    enc_n_layers: int = 27
    enc_ff_dim: int = 4304
    enc_n_heads: int = 16
    proj_out_dim: int = 2048
    crop_size: int = 378
    in_channels: int = 3
    max_crops: int = 12
    overlap_margin: int = 4
    proj_inner_dim: int = 8192

    @property
    def grid_size(self) -> int:
        return self.crop_size // self.enc_patch_size  # 27

    @property
    def num_patches(self) -> int:
        return self.grid_size**2  # 729

    @property
    def margin_px(self) -> int:
        return self.overlap_margin * self.enc_patch_size  # 56

    @property
    def window_px(self) -> int:
        return (self.grid_size - 2 * self.overlap_margin) * self.enc_patch_size  # 266


@dataclass(frozen=True)
class RegionConfig:
    dim: int = 2048
    coord_feat_dim: int = 256
    coord_out_dim: int = 1024
    size_feat_dim: int = 512
    size_out_dim: int = 2048
    inner_dim: int = 8192


@dataclass(frozen=True)
class Template:
    """The token ids before and after the text of a prompt."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class Templates:
    caption: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "short": (1, 32708, 2, 12492, 3),
            "normal": (1, 32708, 2, 6382, 3),
            "long": (1, 32708, 2, 4059, 3),
        }
    )
    query: Template = Template((1, 15381, 2), (3,))
    detect: Template = Template((1, 7235, 476, 2), (3,))
    point: Template = Template((1, 2581, 2), (3,))


@dataclass(frozen=True)
class TokenizerConfig:
    bos_id: int = 0
    eos_id: int = 0
    answer_id: int = 3
    thinking_id: int = 4
    coord_id: int = 5
    size_id: int = 6
    start_ground_points_id: int = 7
    end_ground_id: int = 9
    templates: Templates = field(default_factory=Templates)


@dataclass(frozen=True)
class MoondreamConfig:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    @property
    def prefix_len(self) -> int:
        """Positions that attend to each other both ways: bos and the image."""
        return 1 + self.vision.num_patches  # 730

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "MoondreamConfig":
        """Read a config.json's content. Raises WeightsMismatch for sizes that cannot belong together."""
        raw = raw.get("config", raw)
        tokenizer = dict(raw.get("tokenizer", {}))
        tokenizer["templates"] = _templates(tokenizer.get("templates", {}))
        config = MoondreamConfig(
            text=_section(TextConfig, raw.get("text", {})),
            vision=_section(VisionConfig, raw.get("vision", {})),
            region=_section(RegionConfig, raw.get("region", {})),
            tokenizer=_section(TokenizerConfig, tokenizer),
        )
        _check(config)
        return config

    @staticmethod
    def from_file(path: Path) -> "MoondreamConfig":
        """Read a config.json. Raises WeightsMismatch if it is not one."""
        try:
            return MoondreamConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise WeightsMismatch(f"{path} is not a Moondream2 config.json: {error}") from error


def _section(kind: type[Section], raw: Mapping[str, Any]) -> Section:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in raw.items() if key in known})


def _templates(raw: Mapping[str, Any]) -> Templates:
    default = Templates()
    prompts = {
        skill: Template(tuple(raw[skill]["prefix"]), tuple(raw[skill]["suffix"]))
        for skill in ("query", "detect", "point")
        if raw.get(skill)
    }
    caption = {**default.caption, **{length: tuple(ids) for length, ids in (raw.get("caption") or {}).items()}}
    return Templates(caption=caption, **prompts)


def _check_ids(tokenizer: TokenizerConfig, vocab_size: int) -> None:
    templates = tokenizer.templates
    asked = (templates.query, templates.detect, templates.point)
    prompts = [*templates.caption.values(), *(template.prefix + template.suffix for template in asked)]
    if not all(prompts) or not templates.query.suffix:
        raise WeightsMismatch("The checkpoint's config.json cannot be right: a prompt template is empty.")
    named = [getattr(tokenizer, f.name) for f in fields(tokenizer) if f.name != "templates"]
    # The defaults of templates that a small checkpoint does not use may lie beyond its vocabulary; the engine checks.
    wrong = [i for i in named if type(i) is not int or not 0 <= i < vocab_size]
    wrong += [i for prompt in prompts for i in prompt if type(i) is not int or i < 0]
    if wrong:
        raise WeightsMismatch(f"The checkpoint's config.json cannot be right: {wrong[0]!r} is no id of its vocabulary.")


def _check(config: MoondreamConfig) -> None:
    text, vision, region = config.text, config.vision, config.region
    for section in (text, vision, region):
        for size in fields(section):
            value, least = getattr(section, size.name), 0 if size.name == "overlap_margin" else 1
            if type(value) is not int or not least <= value < MAX_SIZE:
                raise WeightsMismatch(f"The checkpoint's config.json cannot be right: {size.name} is {value!r}.")
    _check_ids(config.tokenizer, text.vocab_size)
    rules = {
        "vision.in_channels must be 3": vision.in_channels == 3,
        "text.dim must be a multiple of 4 x text.n_heads": text.dim % (4 * text.n_heads) == 0,
        "text.n_heads must be a multiple of text.n_kv_heads": text.n_heads % text.n_kv_heads == 0,
        "vision.enc_dim must be a multiple of vision.enc_n_heads": vision.enc_dim % vision.enc_n_heads == 0,
        "vision.crop_size must be a multiple of vision.enc_patch_size": vision.crop_size % vision.enc_patch_size == 0,
        "vision.overlap_margin must leave a window": vision.window_px > 0,
        "vision.proj_out_dim must equal text.dim": vision.proj_out_dim == text.dim,
        "region.dim must equal text.dim": region.dim == text.dim,
        "text.max_context must exceed the image's positions": text.max_context > config.prefix_len,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise WeightsMismatch(f"The checkpoint's config.json cannot be right: {'; '.join(broken)}.")
