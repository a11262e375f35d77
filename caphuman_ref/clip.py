"""CLIP's text and vision encoders.

Parameter names equal those of Hugging Face's CLIPTextModel and CLIPVisionModel, `pre_layrnorm` included.
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from caphuman_edge.runtime.contract import TEXT_TOKENS, TextConfig, VisionConfig

EMBEDDING_STD = 0.02


class TextEncoder(nn.Module):
    """77 token ids to 77 features: causal attention, padding not masked, final norm applied."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.text_model = TextModel(config)

    def forward(self, input_ids: Int[Tensor, "b 77"]) -> Float[Tensor, "b 77 width"]:
        return self.text_model(input_ids)


class VisionEncoder(nn.Module):
    """A preprocessed picture to its class token and patch tokens; the final norm is not applied."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionModel(config)

    def forward(self, pixel_values: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b n width"]:
        return self.vision_model(pixel_values)


class TextModel(nn.Module):
    """Token and position embeddings, layers, norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.width, config.layers, config.heads, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = _embedding(config.vocabulary, config.width)
        self.position_embedding = _embedding(TEXT_TOKENS, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight


class VisionModel(nn.Module):
    """Patch embeddings, norm, layers. Every checkpoint has `post_layernorm`, but CapHuman reads the state before it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)
        self.encoder = Encoder(config.width, config.layers, config.heads, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))


class VisionEmbeddings(nn.Module):
    """The class token, then one token a patch in rows from the top left, plus their positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width) * EMBEDDING_STD)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = _embedding(config.tokens, config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, patches, width)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Encoder(nn.Module):
    """Pre-normalised transformer layers."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, causal) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        return tokens + self.mlp(self.layer_norm2(tokens))


class SelfAttention(nn.Module):
    """Multi-head attention; causal where a token may not see later ones."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        query, key, value = (self._split(project(tokens)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(tokens.shape))

    def _split(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        return x.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)  # (B, heads, N, C/heads)


class MLP(nn.Module):
    """Two linear layers around CLIP's "quick gelu", x * sigmoid(1.702 x)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


def _embedding(count: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(count, width)
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return embedding
