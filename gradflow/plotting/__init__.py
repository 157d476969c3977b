"""Every picture by name: `plot_x(run, ax)` draws into an `Axes` of yours and returns it.

In a notebook or for a paper::

    figure, ax = plt.subplots()
    gradflow.plotting.plot_ratio_depth(run, ax)

Nothing here touches pyplot, matplotlib's settings or the run. `gradflow.plotting.gallery` has their titles and
explanations, and writes them to files.
"""

from gradflow.plotting.comparison import (
    plot_compare_grad_norm,
    plot_compare_gradient,
    plot_compare_loss,
    plot_compare_ratio,
    plot_compare_signal,
    plot_compare_tokens,
)
from gradflow.plotting.depth import (
    plot_branch_depth,
    plot_gain_depth,
    plot_gradient_depth,
    plot_gradient_share,
    plot_ratio_depth,
    plot_signal_depth,
    plot_signal_share,
)
from gradflow.plotting.heat import (
    plot_cosine_map,
    plot_gain_map,
    plot_gradient_map,
    plot_ratio_map,
    plot_signal_map,
    plot_update_map,
)
from gradflow.plotting.layers import plot_path_lengths, plot_units, plot_update_ratio
from gradflow.plotting.timeline import (
    plot_grad_norm,
    plot_gradient_ledger,
    plot_learning_rate,
    plot_loss,
    plot_signal_ledger,
)
from gradflow.plotting.tokens import (
    plot_attention_entropy,
    plot_attention_logits,
    plot_effective_rank,
    plot_outliers,
    plot_token_cosine,
)

__all__ = [
    "plot_attention_entropy", "plot_attention_logits", "plot_branch_depth", "plot_compare_grad_norm",
    "plot_compare_gradient", "plot_compare_loss", "plot_compare_ratio", "plot_compare_signal",
    "plot_compare_tokens", "plot_cosine_map", "plot_effective_rank", "plot_gain_depth", "plot_gain_map",
    "plot_grad_norm", "plot_gradient_depth", "plot_gradient_ledger", "plot_gradient_map", "plot_gradient_share",
    "plot_learning_rate", "plot_loss", "plot_outliers", "plot_path_lengths", "plot_ratio_depth", "plot_ratio_map",
    "plot_signal_depth", "plot_signal_ledger", "plot_signal_map", "plot_signal_share", "plot_token_cosine",
    "plot_units", "plot_update_map", "plot_update_ratio",
]  # fmt: skip
