"""Recipes: which layers of which graphs get what. Found by `sensitivity`; small files in recipes/, one a format.

    {"format": 1, "clip": 0, "affine": true, "round_outputs": true, "measured_on": "...",
     "rules": {"denoiser": [["float", "unet.out.2.weight"], ["weights", "*.emb_layers.*"], ["int8", "*"]],
               "vae_decoder": [["weights", "*"]]}}

Rules are read from above: the first whose pattern, as of file names (fnmatch), fits a layer's name decides. Of a graph
without rules nothing changes. The denoiser's rules hold for its fused and its split form. Beside them may stand
`"round_scores": ["*.attn1.to_q.weight"]`: attentions whose queries and keys are rounded where they meet, too.
"""
import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.machine import FUSED, SPLIT

FORMAT = 1
FOLDER = Path(__file__).parent / "recipes"  # of those that we found on the miniature
DENOISER = (*FUSED, *SPLIT)  # graphs that share their rules
MAX_BYTES = 1 << 20
Treatment = Literal["float", "weights", "int8",  # as it is; int8 weights; int8 weights and activations
                    "palette-4", "palette-6", "palette-8"]  # bits an index into a table of weights: Core ML alone
Rule = tuple[Treatment, str]  # and a pattern of names


@dataclass(frozen=True)
class Recipe:
    """How a bundle's graphs become int8 in one format."""

    rules: Mapping[str, tuple[Rule, ...]]  # by graph
    clip: float = 0.0  # share of an activation's numbers that its grid covers; 0 is the grid of least squared error
    affine: bool = True  # grids of activations may have a zero point
    round_outputs: bool = True  # of convolutions, which ONNX Runtime needs and OpenVINO does not
    measured_on: str = ""
    round_scores: tuple[str, ...] = ()  # patterns of layers whose queries are rounded, with the keys that they meet

    def treatment(self, graph: str, layer: str) -> Treatment:
        """What a layer of a graph gets."""
        return next((kind for kind, pattern in self._of(graph) if fnmatch.fnmatchcase(layer, pattern)), "float")

    def changes(self, graph: str) -> bool:
        """Whether a graph has rules."""
        return bool(self._of(graph))

    def rounds(self, graph: str) -> bool:
        """Whether any layer of a graph may get int8 activations."""
        return any(kind == "int8" for kind, _ in self._of(graph))

    def precision(self, graph: str) -> str:
        """What a bundle calls the stored weights of a graph that it changes."""
        return "palettised-mixed" if any(palette_bits(kind) for kind, _ in self._of(graph)) else "int8"

    def rounds_scores(self, layer: str) -> bool:
        """Whether what an attention's query layer gives is rounded where it meets keys."""
        return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.round_scores)

    def to_text(self) -> str:
        """The text that `read_recipe` reads."""
        facts = {"format": FORMAT, "clip": self.clip, "affine": self.affine, "round_outputs": self.round_outputs,
                 **({"round_scores": list(self.round_scores)} if self.round_scores else {}),
                 "measured_on": self.measured_on}
        head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
        graphs = ",\n".join(f"  {json.dumps(graph)}: [\n   " + ",\n   ".join(json.dumps(rule) for rule in rules) + "]"
                            for graph, rules in self.rules.items())
        return f'{{\n{head},\n "rules": {{\n{graphs}}}\n}}\n'

    def _of(self, graph: str) -> tuple[Rule, ...]:
        return self.rules.get(FUSED[0] if graph in DENOISER else graph, ())


def palette_bits(treatment: Treatment) -> int:
    """Bits of an index into a palette; 0 for what is none."""
    return int(treatment.removeprefix("palette-")) if treatment.startswith("palette-") else 0


def recipe_file(given: Path) -> Path:
    """One of ours by its name, such as coreml-mixed, else the file itself."""
    return {file.stem: file for file in FOLDER.glob("*.json")}.get(str(given), given)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises BadInput for a file that is none."""
    try:
        data: Any = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path, or name one of "
                       f"ours: {', '.join(sorted(file.stem for file in FOLDER.glob('*.json')))}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({error}); take {FOLDER / 'onnx.json'} as a pattern") from error
    if not _is_recipe(data):
        raise BadInput(f"{path} is no recipe of format {FORMAT}; take {FOLDER / 'onnx.json'} as a pattern")
    rules = {graph: tuple((kind, pattern) for kind, pattern in rows) for graph, rows in data["rules"].items()}
    scores = tuple(data.get("round_scores", ()))  # which recipes of before lack
    return Recipe(rules, float(data["clip"]), data["affine"], data["round_outputs"], data["measured_on"], scores)


def _is_recipe(data: Any) -> bool:
    kinds = {"format": int, "clip": int | float, "affine": bool, "round_outputs": bool, "measured_on": str,
             "rules": dict}
    optional = {"round_scores": list}
    return (isinstance(data, dict) and kinds.keys() <= data.keys() <= {*kinds, *optional} and data["format"] == FORMAT
            and all(isinstance(data[name], kind) for name, kind in {**kinds, **optional}.items() if name in data)
            and 0 <= data["clip"] <= 1 and all(isinstance(pattern, str) for pattern in data.get("round_scores", ()))
            and all(isinstance(rows, list) and all(map(_is_rule, rows)) for rows in data["rules"].values()))


def _is_rule(row: Any) -> bool:
    return (isinstance(row, list) and len(row) == 2 and row[0] in get_args(Treatment)
            and isinstance(row[1], str))
