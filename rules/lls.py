"""The LLS family (Apolinario, Roy, Roy, WACV 2025, arXiv 2405.15868) and LocalLosses (Nokland and Eidnes, ICML 2019).

Every member is the same head with other ingredients: latents z = pool(activations), scores = f(z) basisT, modulated.

| rule            | f         | basis                          | modulation (trained)       |
| --------------- | --------- | ------------------------------ | -------------------------- |
| LLS             | normalise | P [n, D], fixed waves          | -                          |
| LLS_M           | normalise | P                              | m [n]                      |
| LLS_MxM         | normalise | P                              | M [n, n], scores M         |
| LLS_MxM_reduced | normalise | P_r [r, D]                     | M [r, n], scores M         |
| LLS_Random      | identity  | Q = pool1d(R), R [n, hidden]   | -                          |
| LLS_M_Random    | identity  | Q                              | m [n, 1]                   |
| LLS_MxM_Random  | identity  | Q                              | M [n, n], scores M^T       |
| LocalLosses     | identity  | pool1d(R), R trained           | -                          |

LLS_M_Random projects on pool1d(m R) and LLS_MxM_Random on pool1d(M R); pooling is linear along the latents, so both
are the modulation of z QT written above.
"""

from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import NORM_EPS, WAVEFORMS, HeadResult, make_basis
from unlocked.rules.base import HeadArguments, LayerInfo, LocalRule

__all__ = [
    "LLS",
    "LLS_M",
    "LLSConfig",
    "LLSHead",
    "LLS_M_Random",
    "LLS_MxM",
    "LLS_MxM_Random",
    "LLS_MxM_reduced",
    "LLS_Random",
    "LocalLosses",
]

FEEDBACK_SCALE = 0.1  # standard deviation of R, as the authors draw it
MODULATION_SCALE = 0.01  # of m and M, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class LLSConfig:
    """A configured rule; calling it with a `LayerInfo` builds that layer's head."""

    temperature: float = 0.5
    """T: the scores are divided by it before the softmax."""
    label_smoothing: float = 0.0
    waveform: str = "cosine"
    """"cosine" (a sine, under the authors' name) or "square" (its sign). Not used by the random rules."""

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < inf):
            raise ValueError(f"temperature is {self.temperature!r}; it must be positive and finite")
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            raise ValueError(f"label_smoothing is {self.label_smoothing!r}; it must lie in [0, 1)")
        if self.waveform not in WAVEFORMS:
            raise ValueError(f"waveform {self.waveform!r} is not known; valid: {', '.join(WAVEFORMS)}")

    def __call__(self, layer: LayerInfo) -> LocalRule:
        raise NotImplementedError


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class LLSHead(LocalRule):
    """One layer's head, for targets of all tasks of the library. `basis` is a buffer that is never saved: it is
    recomputed from the layer's shape.

    Parameter names are the authors': `feedback` is R, or what the rules on the fixed waves train (m or M); `modulation`
    is m or M of LLS_M_Random and LLS_MxM_Random.
    """

    takes = ("classification", "multi-label", "regression", "tokens", "segmentation", "own")
    feedback: nn.Parameter | None
    modulation: nn.Parameter | None
    basis: Tensor | None

    def __init__(self, layer: LayerInfo, config: LLSConfig, *, normalize: bool) -> None:
        super().__init__()
        self.layer, self.num_latents = layer, layer.num_latents
        self.temperature, self.label_smoothing = config.temperature, config.label_smoothing
        self.normalize = normalize
        self.register_parameter("feedback", None)
        self.register_parameter("modulation", None)
        self.register_buffer("basis", None, persistent=False)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        task = self.layer.task
        if task.name == "classification":
            return F.cross_entropy(self.scores(activations), labels, label_smoothing=self.label_smoothing)
        targets = self.layer.targets(labels)
        smoothing = self.label_smoothing
        return task.projected_loss(self.latents(activations), self.projection(), targets, label_smoothing=smoothing)

    def latents(self, activations: Tensor) -> Tensor:
        """[N, num_latents], as the basis meets them."""
        z = self.layer.latents(activations)
        return F.normalize(z, dim=1, eps=NORM_EPS) if self.normalize else z

    def projection(self) -> Tensor:
        """[n, num_latents]: basis, modulation and temperature in one matrix, of which the scores are the latents'
        projections. Nothing else of the size [N, n] is needed then."""
        basis, matrix = self.project_basis(), self.matrix()
        if matrix is not None:
            basis = basis * matrix[:, None] if matrix.dim() == 1 else matrix.T @ basis
        return basis / self.temperature

    def scores(self, activations: Tensor) -> Tensor:
        z = self.latents(activations)
        raw = z @ self.project_basis().T
        matrix = self.matrix()
        if matrix is not None:
            raw = raw * matrix if matrix.dim() == 1 else raw @ matrix
        return raw / self.temperature

    def project_basis(self) -> Tensor:
        """The basis [R, D]: fixed waves, or the feedback R pooled to the number of latents."""
        if self.basis is not None:
            return self.basis
        assert self.feedback is not None
        return F.adaptive_avg_pool1d(self.feedback[None], self.num_latents)[0]

    def matrix(self) -> Tensor | None:
        """The modulation as the head applies it: [N], or [R, N] to be multiplied from the right."""
        return None

    def head_arguments(self) -> HeadArguments | None:
        """None where the task is not classification: the closed form is cross-entropy's of a sample's one class."""
        if self.layer.task.name != "classification":
            return None
        matrix = self.matrix()
        with torch.no_grad():
            basis = self.project_basis()
        trains_basis = self.basis is None and self.feedback is not None and self.feedback.requires_grad
        return HeadArguments(
            basis,
            None if matrix is None else matrix.detach(),
            self.normalize,
            self.temperature,
            self.label_smoothing,
            trains_basis,
        )

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        return []


class _Waves(LLSHead):
    """The rules on the fixed basis: LLS, LLS_M, LLS_MxM, LLS_MxM_reduced."""

    def __init__(self, layer: LayerInfo, config: LLSConfig, kind: str) -> None:
        super().__init__(layer, config, normalize=True)
        classes = layer.num_classes
        rows = layer.reduced_rank if kind == "reduced" else classes
        if kind == "reduced" and rows > layer.num_latents:
            raise ValueError(
                f"its basis of reduced_rank={rows} rows is no reduction of {layer.num_latents} latents; give the block "
                f"a reduced_rank of at most {layer.num_latents}"
            )
        self.basis = make_basis(rows, layer.num_latents, config.waveform)
        if kind == "vector":
            self.feedback = nn.Parameter(_randn((classes,), MODULATION_SCALE, layer))
        elif kind in ("matrix", "reduced"):
            self.feedback = nn.Parameter(_randn((rows, classes), MODULATION_SCALE, layer))

    def matrix(self) -> Tensor | None:
        return self.feedback

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        return [] if result.modulation_grad is None else [result.modulation_grad]


class _Feedback(LLSHead):
    """The rules on a random feedback R: LLS_Random, LLS_M_Random, LLS_MxM_Random, and LocalLosses, which trains it."""

    def __init__(self, layer: LayerInfo, config: LLSConfig, kind: str) -> None:
        super().__init__(layer, config, normalize=False)
        classes = layer.num_classes
        generator = layer.generator()
        feedback = FEEDBACK_SCALE * torch.randn(classes, layer.hidden, generator=generator)
        self.feedback = nn.Parameter(feedback, requires_grad=kind == "trained")
        if kind == "vector":
            self.modulation = nn.Parameter(MODULATION_SCALE * torch.randn(classes, 1, generator=generator))
        elif kind == "matrix":
            self.modulation = nn.Parameter(MODULATION_SCALE * torch.randn(classes, classes, generator=generator))
        self._per_class = kind == "vector"
        self._pooled: tuple[int, Tensor] | None = None

    def project_basis(self) -> Tensor:
        assert self.feedback is not None
        if self.feedback.requires_grad:
            return super().project_basis()
        # R never changes in training, so it is pooled once; loading other values moves its version on.
        version = hash((self.feedback._version, self.feedback.data_ptr()))
        if self._pooled is None or self._pooled[0] != version:
            self._pooled = (version, super().project_basis().detach().contiguous())
        return self._pooled[1]

    def matrix(self) -> Tensor | None:
        if self.modulation is None:
            return None
        return self.modulation[:, 0] if self._per_class else self.modulation.T

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        if result.basis_grad is not None:
            return [self._unpool(result.basis_grad)]
        if result.modulation_grad is None:
            return []
        grad = result.modulation_grad
        return [grad[:, None] if grad.dim() == 1 else grad.T]

    def _unpool(self, basis_grad: Tensor) -> Tensor:
        """The way back through adaptive_avg_pool1d, from [n, D] to R's [n, hidden]."""
        assert self.feedback is not None
        if self.feedback.shape[1] == self.num_latents:
            return basis_grad
        with torch.enable_grad():
            feedback = self.feedback.detach().requires_grad_()
            pooled = F.adaptive_avg_pool1d(feedback[None], self.num_latents)[0]
        return torch.autograd.grad(pooled, feedback, basis_grad)[0]


def _randn(shape: tuple[int, ...], scale: float, layer: LayerInfo) -> Tensor:
    return scale * torch.randn(shape, generator=layer.generator())


class LLS(LLSConfig):
    """Fixed waves, nothing trained besides the block."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Waves(layer, self, "plain")


class LLS_M(LLSConfig):
    """LLS with one trained factor per class."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Waves(layer, self, "vector")


class LLS_MxM(LLSConfig):
    """LLS with a trained n x n mixing of the scores."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Waves(layer, self, "matrix")


class LLS_MxM_reduced(LLSConfig):
    """LLS_MxM on r basis rows instead of n."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Waves(layer, self, "reduced")


class LLS_Random(LLSConfig):
    """A fixed random projection of the latents, which are not normalised."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Feedback(layer, self, "plain")


class LLS_M_Random(LLSConfig):
    """LLS_Random with one trained factor per class."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Feedback(layer, self, "vector")


class LLS_MxM_Random(LLSConfig):
    """LLS_Random with a trained n x n mixing of R's rows."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Feedback(layer, self, "matrix")


class LocalLosses(LLSConfig):
    """LLS_Random with R trained: a local classifier, the prediction loss of Nokland and Eidnes (2019)."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        return _Feedback(layer, self, "trained")
