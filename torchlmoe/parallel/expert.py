"""Expert parallelism: each rank of `ep` has a part of the experts of every layer, and tokens are sent to them.

The ranks of `ep` are taken from the ranks with different tokens: dp_shard, cp and tp. FSDP shards the experts over the
remaining ranks. Without expert parallelism it shards them over all, including those of tp: between blocks each rank has
different tokens, so experts need not be split by their width.
"""

from torchlmoe.feed_forwards.experts import Experts
from torchlmoe.feed_forwards.moe import MoE
from torchlmoe.model.decoder import Decoder
from torchlmoe.parallel.ranks import Ranks
from torchlmoe.routing.exchange import Exchange
from torchlmoe.styles.heads import HeadParameters


def check_experts(model: Decoder, degree: int) -> None:
    """Raises ValueError if the experts of a layer cannot be spread over `degree` ranks."""
    for index, block in model.blocks.items():
        layer, (letter, _) = block.feed_forward, model.places_in_common[index]
        spread = [layer.experts] if isinstance(layer, MoE) else []
        for name, module in block.named_modules():
            if degree > 1 and isinstance(module, Experts) and module not in spread:
                raise ValueError(
                    f"parallelism.expert_parallel_degree = {degree} spreads the experts of MoE layers only, not {name} "
                    f"of model.layers.{letter}; make its feed-forward layer a subclass of MoE, or use degree 1."
                )
        if isinstance(layer, MoE) and layer.num_experts % degree:
            raise ValueError(
                f"parallelism.expert_parallel_degree = {degree} does not divide the {layer.num_experts} experts of "
                f"model.layers.{letter}; choose a divisor."
            )


def apply_expert_parallel(model: Decoder, ranks: Ranks) -> None:
    """Splits the experts of every layer over `ep`. Raises the errors of `check_experts`."""
    mesh = ranks.experts["ep"]
    check_experts(model, mesh.size())
    for block in model.blocks.values():
        layer = block.feed_forward
        if not isinstance(layer, MoE):
            continue
        stacks = [name for name, _ in layer.experts.named_parameters()]
        HeadParameters(dict.fromkeys(stacks, 0))._apply(layer.experts, mesh)
        layer.exchange = Exchange(mesh, layer.num_experts)
