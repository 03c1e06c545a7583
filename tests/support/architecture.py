"""Write docs/architecture.md and its diagram from the code: `python -m tests.support.architecture`.

Shapes are those that a forward pass has, sizes and parameters those of the presets, and each choice of the
configuration needs a formula: a choice without one is a KeyError.
"""

import dataclasses
import typing
from html import escape
from pathlib import Path

import torch
from torch import nn

from eval.breakdown import PARTS, BreakdownConfig, breakdown, build
from modeling_gpt2modern import MLPS, PRESETS, GPT2ModernConfig, GPT2ModernForCausalLM
from modeling_gpt2modern.layers_gpt2modern import NORMS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, DIAGRAM = DOCS / "architecture.md", DOCS / "architecture.svg"
BATCH, TOKENS = 3, 5
# No two sizes are equal, nor is one a product of others, so that a number of a shape has one name.
SIZES = {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
SIZES |= {"intermediate_size": 112, "vocab_size": 71, "num_hidden_layers": 2, "max_position_embeddings": 64}
SYMBOLS = {BATCH: "B", TOKENS: "T", 36: "C", 40: "H D", 20: "G D", 112: "F", 71: "V", 10: "D", 4: "H", 2: "G", 1: "1"}

NORM_FORMULAS = {
    "layernorm": r"g \odot \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} + b",
    "rmsnorm": r"g \odot \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}}",
}
ACTIVATIONS = {
    "gelu_new": r"\frac{u}{2} (1 + \tanh(\sqrt{2 / \pi} (u + 0.044715 u^3)))",
    "gelu": r"u \Phi(u)",
    "relu2": r"\max(u, 0)^2",
    "silu": r"\frac{u}{1 + e^{-u}}",
}
POSITION_FORMULAS = {
    "learned": r"h_t = e_{x_t} + p_t",
    "rope": r"(q_i, q_{i+D/2}) \to (q_i \cos t\theta_i - q_{i+D/2} \sin t\theta_i,\quad "
    r"q_{i+D/2} \cos t\theta_i + q_i \sin t\theta_i)",
}
# w: learned numbers. gate(x): sigmoid(W x) of the first 12 features.
FLAG_FORMULAS = {
    "use_qk_norm": r"q \to \mathrm{norm}(q),\quad k \to \mathrm{norm}(k)",
    "use_embedding_norm": r"h^0 \to \mathrm{norm}(h^0)",
    "use_x0_residual": r"h^l \to w_0 h^l + w_1 h^0",
    "use_unet_skips": r"h^l \to h^l + w h^{L-1-l}",
    "use_value_residual": r"v^l \to (1 - w) v^l + w v^0",
    "value_embedding_layers": r"v \to v + 2\mathrm{gate}(x)u_{x_t}",
    "use_smear": r"h_t \to h_t + w\mathrm{gate}(h_t)e_{x_{t-1}}",
    "bigram_vocab_size": r"h^l \to h^l + wb_{\mathrm{hash}(x_{t-1}, x_t)}",
    "use_key_offset": r"k_{t,i} \to k_{t-1,i} \quad (i \ge \mathrm{rotated})",
    "use_backout": r"h^L \to h^L + w h^{2L/3}",
}


def shape_of(sizes: torch.Size) -> str:
    return f"({', '.join(SYMBOLS[size] for size in sizes)})"


def shapes() -> list[tuple[str, str, str, str]]:
    """List (module, class, shape of its weight, shape of its output) in the order in which a forward pass of `modern`
    with grouped heads calls them; of the layers, the first."""
    model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("modern", **SIZES)).eval()
    rows = []

    def record(name: str, module: nn.Module, output) -> None:
        first = output[0] if isinstance(output, tuple) else output
        weight = getattr(module, "weight", None)
        rows.append(
            (name, type(module).__name__, "" if weight is None else shape_of(weight.shape), shape_of(first.shape))
        )

    for name, module in model.named_modules():
        if not name or name in ("model", "model.layers") or ".layers.1" in name or name.endswith("act_fn"):
            continue
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
    model(torch.zeros(BATCH, TOKENS, dtype=torch.long), use_cache=False)
    return [(name.replace(".0", "[l]"), *rest) for name, *rest in rows if rest[0] not in ("Identity", "Unchanged")]


def users(field: str, value=None) -> str:
    """List the presets in which a field is on, or has a value; of those in four sizes the smallest."""
    configs = {name: GPT2ModernConfig.from_preset(name) for name in PRESETS}
    found = [name for name, c in configs.items() if (getattr(c, field) == value if value else getattr(c, field))]
    return ", ".join(f"`{name}`" for name in found if name.rpartition("-")[2] not in ("medium", "large", "xl"))


def formulas() -> list[str]:
    """Write a row for each choice: setting, formula, presets."""
    rows = ["| setting | formula | presets |", "|---|---|---|"]
    choices = GPT2ModernConfig.__annotations__["position_embedding_type"]
    for field, values, table in (
        ("position_embedding_type", typing.get_args(choices), POSITION_FORMULAS),
        ("norm_type", NORMS, NORM_FORMULAS),
    ):
        rows += [f"| `{field}={value}` | ${table[value]}$ | {users(field, value)} |" for value in values]
    for name, kind in MLPS.items():
        inner = r"a(W_{gate} x) \odot W_{up} x" if kind.gated else r"a(W_{up} x)"
        formula = rf"W_{{down}}({inner}) \quad a(u) = {ACTIVATIONS[kind.activation]}"
        rows.append(f"| `mlp_type={name}` | ${formula}$ | {users('mlp_type', name)} |")
    for field in dataclasses.fields(GPT2ModernConfig):
        is_flag = field.name.startswith("use_") and field.name != "use_cache"
        if is_flag or field.name in ("value_embedding_layers", "bigram_vocab_size"):
            rows.append(f"| `{field.name}` | ${FLAG_FORMULAS[field.name]}$ | {users(field.name)} |")
    rows.append(rf"| `final_logit_softcapping=c` | $c\tanh(z / c)$ | {users('final_logit_softcapping')} |")
    return rows


def presets() -> list[str]:
    """Write the sizes of the presets, then their parameters by part."""
    sizes = {"layers": "num_hidden_layers", "width C": "hidden_size", "heads H": "num_attention_heads"}
    sizes |= {"head D": "head_dim", "MLP F": "intermediate_size", "positions": "max_position_embeddings"}
    sizes |= {"vocabulary V": "vocab_size"}
    rows = [f"| preset | {' | '.join(sizes)} | tied head |", "|---" * (len(sizes) + 2) + "|"]
    counted = {}
    for name in PRESETS:
        model, seq_len = build(BreakdownConfig(model_preset=[name]), name)
        config = GPT2ModernConfig.from_preset(name)
        numbers = " | ".join(f"{getattr(config, field):,}" for field in sizes.values())
        rows.append(f"| `{name}` | {numbers} | {'yes' if config.tie_word_embeddings else 'no'} |")
        counted[name] = {part: parameters for part, (parameters, _) in breakdown(model, seq_len).items()}
        assert sum(counted[name].values()) == model.num_parameters()
    parts = [part for part in PARTS if any(each[part] for each in counted.values())]
    rows += ["", f"| preset | {' | '.join(parts)} | all |", "|---" * (len(parts) + 2) + "|"]
    for name, each in counted.items():
        rows.append(f"| `{name}` | {' | '.join(f'{each[part]:,}' for part in parts)} | {sum(each.values()):,} |")
    return rows


def diagram() -> str:
    """Draw one layer and what is around it, with the recorded shapes."""
    shape = {name: output for name, _, _, output in shapes()}
    layer = "model.layers[l]"
    boxes = [  # (label, shape of the output, colour, in the layer)
        ("token ids", "(B, T)", "#eceff1", False),
        ("embed_tokens", shape["model.embed_tokens"], "#c5cae9", False),
        ("input_layernorm", shape[f"{layer}.input_layernorm"], "#fff9c4", True),
        ("q_proj, k_proj, v_proj", "q {q_proj}, k and v {k_proj}".format(
            **{each: shape[f"{layer}.self_attn.{each}"] for each in ("q_proj", "k_proj")}), "#c8e6c9", True),
        ("RoPE, softmax(q k / sqrt(D)) v", "(B, T, H D)", "#c8e6c9", True),
        ("o_proj", shape[f"{layer}.self_attn.o_proj"], "#c8e6c9", True),
        ("+", shape[layer], "#ffffff", True),
        ("post_attention_layernorm", shape[f"{layer}.post_attention_layernorm"], "#fff9c4", True),
        ("gate_proj, up_proj", shape[f"{layer}.mlp.up_proj"], "#ffe0b2", True),
        ("silu(gate) * up, down_proj", shape[f"{layer}.mlp.down_proj"], "#ffe0b2", True),
        ("+", shape[layer], "#ffffff", True),
        ("norm", shape["model.norm"], "#fff9c4", False),
        ("lm_head", shape["lm_head"], "#c5cae9", False),
    ]  # fmt: skip
    top, step, width, left = 24, 46, 250, 110
    height = top + step * len(boxes)
    inside = [index for index, box in enumerate(boxes) if box[3]]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" font-family="sans-serif" font-size="14">',
        "<title>The layers of the preset modern, with the shapes of their outputs</title>",
        f'<rect width="640" height="{height}" fill="#fff"/>',
        f'<rect x="40" y="{top + step * inside[0] - 10}" width="570" height="{step * len(inside)}" rx="8" '
        'fill="none" stroke="#9e9e9e" stroke-dasharray="5 4"/>',
        f'<text x="600" y="{top + step * inside[-1] + 20}" text-anchor="end" fill="#616161">layer l of L</text>',
    ]
    middle = left + width / 2
    for index, (label, output, colour, _) in enumerate(boxes):
        y = top + step * index
        if index:
            lines.append(f'<line x1="{middle}" y1="{y - step + 30}" x2="{middle}" y2="{y}" stroke="#424242"/>')
        if label == "+":
            start = max(i for i in range(index) if "layernorm" in boxes[i][0])
            lines += [
                f'<path d="M {middle} {top + step * start - 8} H 70 V {y + 15} H {middle - 14}" fill="none" '
                'stroke="#1565c0"/>',
                f'<circle cx="{middle}" cy="{y + 15}" r="14" fill="#fff" stroke="#1565c0"/>',
            ]
        else:
            lines.append(
                f'<rect x="{left}" y="{y}" width="{width}" height="30" rx="5" fill="{colour}" stroke="#757575"/>'
            )
        lines += [
            f'<text x="{middle}" y="{y + 20}" text-anchor="middle">{escape(label)}</text>',
            f'<text x="{left + width + 16}" y="{y + 20}" fill="#37474f">{escape(output)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def page() -> str:
    rows = [f"| `{name}` | {kind} | {weight} | {output} |" for name, kind, weight, output in shapes()]
    return "\n".join(
        [
            "# Architecture",
            "",
            "Written from the code by `python -m tests.support.architecture`. How to choose settings: "
            "[docs/model.md](model.md).",
            "",
            "![layers and shapes of the preset modern](architecture.svg)",
            "",
            "## Shapes",
            "",
            "The modules of the preset `modern` with grouped heads, in the order in which a forward pass calls them.",
            "B: sequences, T: tokens, C: `hidden_size`, H: `num_attention_heads`, G: `num_key_value_heads`,",
            "D: `head_dim`, F: `intermediate_size`, V: `vocab_size`. Inside the attention, queries are (B, H, T, D),",
            "keys and values (B, G, T, D).",
            "",
            "| module | class | weight | output |",
            "|---|---|---|---|",
            *rows,
            "",
            "## One layer",
            "",
            "$$a = h^l + \\mathrm{attention}(\\mathrm{norm}(h^l)) \\qquad "
            "h^{l+1} = a + \\mathrm{mlp}(\\mathrm{norm}(a))$$",
            "",
            "$$q = W_q x \\qquad k = W_k x \\qquad v = W_v x$$",
            "",
            "$$y_i = \\mathrm{softmax}(s q_i k_i^T + M) v_i \\qquad \\mathrm{attention}(x) = W_o [y_1, \\ldots, y_H]$$",
            "",
            "M is 0 where a token may attend and minus infinity elsewhere; s is `attention_scale`, by default "
            "$1 / \\sqrt{D}$.",
            "With grouped heads, H / G queries share a key and a value.",
            "",
            "## Settings",
            "",
            "An arrow says what a setting replaces. t: position, l: layer of L, w: learned numbers, e: embedding,",
            "z: logits, gate(x): the sigmoid of a matrix times the first 12 features of x.",
            "",
            *formulas(),
            "",
            "## Presets",
            "",
            *presets(),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    DIAGRAM.write_text(diagram(), encoding="utf-8")
