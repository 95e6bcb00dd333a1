"""Train the demo checkpoint on generated scenes: `python -m pipeline.demo.train --folder RUN_DIR [--steps N]`.

RUN_DIR holds the state (`training.pt`, to resume from), the log, and `checkpoint/`, the model in hub layout, renewed
with each save. First the vision encoder alone learns what each patch shows, by a throw-away head; then everything
learns together. The learning rate warms up, stays, and falls to zero over the last part.

On a CPU use one process per core, which is faster than threads: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m
pipeline.demo.train --folder RUN_DIR. Each process takes batches of its own, and the gradients are averaged.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from pipeline.demo.batches import COORD, IGNORED, SIZE, SKILLS, Packer, SceneBatches
from pipeline.demo.scenes import BACKGROUNDS, COLORS, SHAPES
from pipeline.demo.tokenizer import PROMPT_WORDS, SPECIAL_TOKENS, train_tokenizer
from pipeline.moondream.config import MoondreamConfig
from pipeline.moondream.model import Moondream

WARMUP_STEPS, DECAY_FRACTION = 200, 0.3
SHORT_WEIGHT, COORD_WEIGHT, PATCH_WEIGHT, BOX_WEIGHT = 2.0, 0.25, 0.5, 1.0
COORD_BLUR_BINS, SIZE_BLUR_BINS = 6.0, 10.0
PATCH_CLASSES = (1 + len(SHAPES), 1 + len(COLORS), 3)
PATCH_OUTPUTS = (*PATCH_CLASSES, 4, len(BACKGROUNDS))
EMPTY_PATCH_WEIGHT = 0.15  # most patches show nothing
VALIDATION_SEED, VALIDATION_SCENES = 987_654_321, 192


def demo_config(vocab_size: int) -> dict[str, object]:
    """The demo's config.json: 8 x 8 patches, always one crop, 3.4 M parameters."""
    query, caption, short, normal, long, detect, point = range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS + PROMPT_WORDS))
    return {
        "text": {
            "dim": 192, "ff_dim": 768, "n_layers": 4, "vocab_size": vocab_size, "max_context": 1024,
            "n_heads": 3, "n_kv_heads": 3,
        },
        "vision": {
            "enc_dim": 128, "enc_patch_size": 14, "enc_n_layers": 5, "enc_ff_dim": 384, "enc_n_heads": 4,
            "proj_out_dim": 192, "crop_size": 112, "in_channels": 3, "max_crops": 1, "overlap_margin": 1,
            "proj_inner_dim": 384,
        },
        "region": {
            "dim": 192, "coord_feat_dim": 64, "coord_out_dim": 1024, "size_feat_dim": 64, "size_out_dim": 2048,
            "inner_dim": 128,
        },
        "tokenizer": {
            "templates": {
                "caption": {
                    "short": [1, caption, 2, short, 3], "normal": [1, caption, 2, normal, 3],
                    "long": [1, caption, 2, long, 3],
                },
                "query": {"prefix": [1, query, 2], "suffix": [3]},
                "detect": {"prefix": [1, detect, 2], "suffix": [3]},
                "point": {"prefix": [1, point, 2], "suffix": [3]},
            },
        },
    }  # fmt: skip


def initialise(model: Moondream, seed: int) -> None:
    """Small random weights; random Fourier frequencies of about 1 to 8 periods a frame; positions of patches as waves
    of the size of their content. (With small random positions, shapes were still guessed at after 40,000 scenes.)"""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("_features"):
            nn.init.normal_(parameter, std=3.0)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02 if "wte" in name else parameter.shape[1] ** -0.5 / 1.5)
    grid_size, dim = model.config.vision.grid_size, model.config.vision.enc_dim
    frequencies = math.pi / 2 * 20 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(grid_size)[:, None] * frequencies  # (grid_size, dim / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, dim / 2)
    down, across = waves[:, None].expand(-1, grid_size, -1), waves[None].expand(grid_size, -1, -1)
    model.vision.pos_emb.data[0] = 0.5 * torch.cat([down, across], dim=-1).flatten(0, 1)


class Trainer:
    """The model, its optimizer and the number of steps done."""

    def __init__(self, config: MoondreamConfig, total_steps: int, learning_rate: float, seed: int) -> None:
        self.config, self.total_steps, self.step = config, total_steps, 0
        self.model = Moondream(config)
        initialise(self.model, seed)
        self.patch_head = nn.Linear(config.vision.enc_dim, sum(PATCH_OUTPUTS))
        self.modules = nn.ModuleList([self.model, self.patch_head])
        frozen = {"region.coord_features", "region.size_features"}
        named = [(n, p) for n, p in self.modules.named_parameters() if n.removeprefix("0.") not in frozen]
        decayed = [p for _, p in named if p.ndim > 1]
        kept = [p for _, p in named if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
        self.learning_rate = learning_rate

    def rate(self) -> float:
        """The learning rate of the next step: warm-up, plateau, linear fall."""
        left = (self.total_steps - self.step) / max(1, DECAY_FRACTION * self.total_steps)
        return self.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS, max(left, 0.0))

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        losses = self.losses(batch, self.forward(batch)) if "inputs" in batch else self.vision_losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _average_gradients(self) -> None:
        """Over the processes of a torchrun, if there are several."""
        if not distributed.is_initialized():
            return
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))

    def vision_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            outputs = self.patch_head(self.model.vision.encode_crops(batch["pixels"]))
        return _patch_losses(outputs.float(), batch)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> patch features (P, num_patches, enc_dim), hidden states of the branches (R, T, dim)."""
        model, prefix_len = self.model, self.config.prefix_len
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = model.vision.encode_crops(batch["pixels"])  # (P, num_patches, enc_dim)
            num_images = len(batch["skills"])
            image = model.vision.image_tokens(list(features[:num_images, None]), [(1, 1)] * num_images)
            bos = model.text.wte[self.config.tokenizer.bos_id].expand(len(image), 1, -1)
            prefix: list[tuple[Tensor, Tensor]] = []  # of each layer: k, v (B, heads, prefix_len, D)

            def attend_prefix(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                prefix.append((k, v))
                return _attention(q, k, v, torch.zeros((), dtype=q.dtype))

            model.text(torch.cat([bos, image], dim=1), torch.arange(prefix_len)[None], attend_prefix)

            rows = model.text.wte[batch["inputs"]]  # (R, T, dim)
            coords = model.region.encode_coord(batch["values"][..., :1])
            sizes = model.region.encode_size(batch["values"])
            kinds = batch["kinds"][..., None]
            rows = torch.where(kinds == COORD, coords, torch.where(kinds == SIZE, sizes, rows))
            image_index, bias = batch["image_index"], _row_bias(batch["branch"], prefix_len, self.config.text.n_heads)

            def attend_row(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                prefix_k, prefix_v = (kept.index_select(0, image_index) for kept in prefix[layer])
                return _attention(q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2), bias)

            hidden = model.text(rows, batch["positions"] + prefix_len, attend_row)
        return features, hidden

    def losses(self, batch: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        features, hidden = outputs
        text, coords, sizes = (batch[key] != IGNORED for key in ("next_token", "next_coord", "next_size"))
        skills = _skills(batch)[text]  # (num_text_targets,)
        weights = torch.where(skills == SKILLS.index("short"), SHORT_WEIGHT, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            token_logits = self.model.text.logits(hidden[text])
            coord_logits = self.model.region.coord_decoder(hidden[coords])
            size_logits = self.model.region.size_decoder(hidden[sizes[..., 0]]).unflatten(-1, (2, -1))
            patch_outputs = self.patch_head(features).float()
        token_loss = F.cross_entropy(token_logits.float(), batch["next_token"][text], reduction="none")
        return {
            "text": (token_loss * weights).sum() / weights.sum(),
            "coord": COORD_WEIGHT * _blurred_loss(coord_logits, batch["next_coord"][coords], COORD_BLUR_BINS),
            "size": COORD_WEIGHT * _blurred_loss(size_logits.flatten(0, 1), batch["next_size"][sizes], SIZE_BLUR_BINS),
            **_patch_losses(patch_outputs, batch),
        }

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """The share of branches whose every token is right when the tokens before it are: for text, just the share
        that greedy decoding answers exactly. For detect and point, tokens only; plus the mean error of a coordinate,
        and how many of the covered patches show the patch head the kind of their shape."""
        features, hidden = self.forward(batch)
        true_kinds = batch["patch_classes"][..., 0]
        kinds = self.patch_head(features.float())[..., : PATCH_CLASSES[0]].argmax(-1)
        patch_kind = (kinds == true_kinds)[true_kinds > 0].float().mean().item()
        predicted = self.model.text.logits(hidden.float()).argmax(-1)
        # The choice between "one more object" and the end is all that counts where coordinates follow.
        wrong = (batch["next_token"] != IGNORED) & (predicted != batch["next_token"])
        num_branches = batch["skills"].shape[1]
        branch = batch["image_index"][:, None] * num_branches + batch["branch"].clamp(min=0)  # (R, T)
        num_wrong = torch.zeros(batch["skills"].numel()).index_add_(0, branch.flatten(), wrong.flatten().float())
        is_right = num_wrong.view_as(batch["skills"]) == 0
        scores = {skill: is_right[batch["skills"] == index].float().mean().item() for index, skill in enumerate(SKILLS)}
        coords = batch["next_coord"] != IGNORED
        errors = self.model.region.decode_coord(hidden[coords].float()) - batch["next_coord"][coords] / 1024
        return {**scores, "patch_kind": patch_kind, "coord_error": errors.abs().mean().item()}

    def save(self, run_dir: Path) -> None:
        state = {"step": self.step, "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, run_dir / "training.pt.part")
        os.replace(run_dir / "training.pt.part", run_dir / "training.pt")
        # float16 keeps three more bits than bfloat16 in the same space; these weights are far from its limits.
        weights = {
            f"model.{name}": value.to(torch.float16).contiguous() for name, value in self.model.state_dict().items()
        }
        save_file(weights, run_dir / "checkpoint" / "model.safetensors", metadata={"format": "pt"})

    def resume(self, run_dir: Path) -> None:
        state = torch.load(run_dir / "training.pt", weights_only=True)
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])


def _skills(batch: dict[str, Tensor]) -> Tensor:
    """The skill that each position belongs to (R, T)."""
    return batch["skills"][batch["image_index"]].gather(1, batch["branch"].clamp(min=0))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of (B, heads, T, D) with a bias (B * heads, T, S) or ().

    Not the fused kernel: its backward pass in bfloat16 is slow on a CPU (17 against 4 ms at (32, 4, 64, 32))."""
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1).to(v.dtype).unflatten(0, q.shape[:2]) @ v


def _row_bias(branch: Tensor, prefix_len: int, n_heads: int) -> Tensor:
    """0 where a position of a row may look, the whole prefix and its own branch's past, and a large negative number
    elsewhere: bfloat16 (R * n_heads, T, prefix_len + T)."""
    R, T = branch.shape
    hidden = (branch[:, :, None] != branch[:, None, :]) | torch.ones(T, T, dtype=torch.bool).triu(1)
    bias = torch.zeros(R, T, prefix_len + T, dtype=torch.bfloat16)
    bias[..., prefix_len:].masked_fill_(hidden, -1e4)
    return bias.repeat_interleave(n_heads, dim=0)


def _patch_losses(outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """How well the throw-away head tells what each patch shows, where the shape it belongs to lies, and from any patch
    what the background is. (Without that, the encoder forgot the background while it learnt alone.)"""
    classes, boxes = batch["patch_classes"], batch["patch_boxes"]
    *logits, predicted, backgrounds = outputs.split(PATCH_OUTPUTS, dim=-1)
    background = batch["background"][:, None].expand(backgrounds.shape[:2])
    class_losses = [
        F.cross_entropy(of.flatten(0, 1), classes[..., i].flatten(), _class_weights(of.shape[-1]))
        for i, of in enumerate(logits)
    ]
    is_covered = classes[..., 0] > 0
    return {
        "patch": PATCH_WEIGHT * torch.stack(class_losses).sum(),
        "box": BOX_WEIGHT * F.l1_loss(predicted[is_covered], boxes[is_covered]),
        "background": PATCH_WEIGHT * F.cross_entropy(backgrounds.flatten(0, 1), background.flatten()),
    }


def _class_weights(num_classes: int) -> Tensor:
    return torch.tensor([EMPTY_PATCH_WEIGHT] + [1.0] * (num_classes - 1))


def _blurred_loss(logits: Tensor, bins: Tensor, blur_bins: float) -> Tensor:
    """Cross entropy against a bell around the true bin: a near miss costs less than a far one."""
    if not len(bins):
        return logits.sum() * 0.0
    distance = torch.arange(logits.shape[-1])[None] - bins[:, None]
    target = torch.softmax(-(distance**2) / (2 * blur_bins**2), dim=-1)
    return F.cross_entropy(logits.float(), target)


def prepare(run_dir: Path, seed: int) -> tuple[Tokenizer, MoondreamConfig]:
    """The tokenizer and config of a run, made at its first start."""
    folder = run_dir / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(seed).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(demo_config(tokenizer.get_vocab_size()), indent=1) + "\n")
    return tokenizer, MoondreamConfig.from_file(folder / "config.json")


class Log:
    """Mean losses and speed between two lines of the log."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self._step = path, step
        self._started_s, self._sums = time.monotonic(), dict[str, float]()

    def add(self, losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss

    def write(self, step: int, scores: dict[str, float]) -> None:
        count, seconds = step - self._step, time.monotonic() - self._started_s
        row = {
            "step": step,
            "s_per_step": round(seconds / count, 3),
            "losses": {name: round(total / count, 4) for name, total in self._sums.items()},
            "scores": {name: round(score, 3) for name, score in scores.items()},
        }
        print(json.dumps(row), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._step, self._started_s, self._sums = step, time.monotonic(), {}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the run; resumes where it has a training.pt")
    parser.add_argument("--steps", type=int, default=9000, help="steps in all")
    parser.add_argument("--vision-steps", type=int, default=2000, help="the first of them, for the vision encoder only")
    parser.add_argument("--batch", type=int, default=16, help="scenes a step and process, about 9 questions each")
    parser.add_argument("--quick", type=int, default=16, help="further pictures a step, for the patch head only")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between saves and validations")
    args = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    cv2.setNumThreads(1)

    tokenizer, config = prepare(args.folder, args.seed)
    trainer = Trainer(config, args.steps, args.learning_rate, args.seed)
    if (args.folder / "training.pt").exists():
        trainer.resume(args.folder)
    packer = Packer(tokenizer, config)
    batches = SceneBatches(packer, (args.seed, rank), args.batch, args.quick, args.vision_steps, trainer.step)
    validation = SceneBatches(packer, (VALIDATION_SEED, 0), VALIDATION_SCENES, num_quick=0).batch(0)
    log = Log(args.folder / "log.jsonl", trainer.step)
    for batch in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8):
        if trainer.step >= trainer.total_steps:
            break
        log.add(trainer.train_step(batch))
        if rank == 0 and (trainer.step % args.save_every == 0 or trainer.step == trainer.total_steps):
            trainer.save(args.folder)
            log.write(trainer.step, trainer.validate(validation))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
