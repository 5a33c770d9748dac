"""A small Llama in plain PyTorch, with the tensor names of a Hugging Face checkpoint.

It exists so that the demo model can be trained and measured without the serving engine: there is no
KV cache, no batching and no sharding here, only the full forward pass over token rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of the network."""

    vocabulary_size: int
    hidden_size: int = 192
    mlp_size: int = 384
    layers: int = 4
    query_heads: int = 6
    kv_heads: int = 2
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.query_heads


def hugging_face_config(shape: LlamaShape, *, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """What goes into ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }


def shape_from_config(config: dict[str, Any]) -> LlamaShape:
    """The sizes that a ``config.json`` describes."""
    return LlamaShape(
        vocabulary_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        mlp_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        query_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
    )


def _rotate(heads_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half layout."""
    low_BHTh, high_BHTh = heads_BHTK.chunk(2, dim=-1)
    return heads_BHTK * cos_TK + torch.cat((-high_BHTh, low_BHTh), dim=-1) * sin_TK


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        kv_size = shape.kv_heads * shape.head_size
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Mix information between positions."""
        batch, length, hidden = x_BTD.shape
        groups = self.shape.query_heads // self.shape.kv_heads

        def split(projected_BTE: Tensor) -> Tensor:
            return projected_BTE.view(batch, length, -1, self.shape.head_size).transpose(1, 2)

        q_BHTK = _rotate(split(self.q_proj(x_BTD)), cos_TK, sin_TK)
        k_BHTK = _rotate(split(self.k_proj(x_BTD)), cos_TK, sin_TK).repeat_interleave(groups, dim=1)
        v_BHTK = split(self.v_proj(x_BTD)).repeat_interleave(groups, dim=1)
        mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        output_BTD: Tensor = self.o_proj(mixed_BHTK.transpose(1, 2).reshape(batch, length, hidden))
        return output_BTD


class FeedForward(nn.Module):
    """The SwiGLU block."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.down_proj = nn.Linear(shape.mlp_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform every position by itself."""
        output_BTD: Tensor = self.down_proj(functional.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return output_BTD


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Add what attention and feed-forward contribute."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TK, sin_TK)
        output_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return output_BTD


class LlamaModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)

    def layer_outputs(self, tokens_BT: Tensor) -> list[Tensor]:
        """The hidden state of every position after each layer, before the final norm."""
        half = self.shape.head_size // 2
        frequency_h = self.shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        position_T = torch.arange(tokens_BT.shape[1], dtype=torch.float32)
        angle_TK = torch.outer(position_T, frequency_h).repeat(1, 2)
        cos_TK, sin_TK = angle_TK.cos(), angle_TK.sin()
        x_BTD: Tensor = self.embed_tokens(tokens_BT)
        outputs: list[Tensor] = []
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TK, sin_TK)
            outputs.append(x_BTD)
        return outputs

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The final hidden state of every position."""
        output_BTD: Tensor = self.norm(self.layer_outputs(tokens_BT)[-1])
        return output_BTD


class LlamaForCausalLM(nn.Module):
    """The language model; its output matrix is the embedding matrix."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.model = LlamaModel(shape)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.05)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of the next token for final hidden states."""
        return hidden_ND @ self.model.embed_tokens.weight.T

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Scores of the next token at every position."""
        return self.logits(self.model(tokens_BT))


def save_weights(network: LlamaForCausalLM, folder: Path) -> None:
    """Store the weights, rounded to bfloat16 and written as float32.

    Served in float32, an answer is then token for token the reference's.
    """
    tensors = {
        name: tensor.detach().to(torch.bfloat16).float().contiguous() for name, tensor in network.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_network(folder: Path) -> LlamaForCausalLM:
    """Load a stored model; it computes in float32."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    network = LlamaForCausalLM(shape_from_config(config))
    tensors = load_file(folder / WEIGHTS_FILE)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return network.eval()
