"""Margin softmax over classes that no single rank holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..core import checks
from ..core.enums import Reduction
from ..core.indices import ABSENT, IGNORED, check_index
from ..core.margins import check_margin
from ..core.ranks import settings, together
from ..core.reductions import reduce_loss
from ..core.similarity import similarity_sum
from ..core.softmax_terms import Terms, cross_entropy, losses, spread, terms
from ..functional.margin_softmax import class_vectors, margin_logits
from ..losses.heads import LinearHead, check_device
from ..losses.margin_softmax import MarginSoftmaxLoss
from ..ops.contrast.op import Contrast
from .collectives import combine, gather_rows, own_rows, scale_gradient, share, sum_over_ranks
from .sampling import Exchange, draw
from .shards import Shards, one_dimension

_OF_SAMPLES = ("scale", "margin", "angular_margin_rad")


class _Rows(NamedTuple):
    """The rows of all ranks, for each to reduce over its own classes.

    weight: (C_r, ...) of this rank. counts: rows of each rank. embeddings: (B, D). labels: (B,) checked. of_samples:
    (B, 1) values that the call gave.
    """

    weight: Tensor
    counts: tuple[int, ...]
    embeddings: Tensor
    labels: Tensor
    of_samples: dict[str, Tensor]


class ShardedMarginSoftmaxLoss(MarginSoftmaxLoss):
    """`MarginSoftmaxLoss` whose classes are spread over the ranks of a process group; loss and gradients are its own.

        loss_i = -log softmax(z)_{y_i},   z_j = s u_ij  (j != y_i),   z_{y_i} = s psi(u_{i,y_i})

    Rank r holds the classes [r n, (r + 1) n), n = ceil(C / ranks). Every rank calls the loss with rows of its own, of
    any number and maybe none. The rows of all ranks are gathered, each rank reduces them over its own classes by one
    call of the op `contrast`, and log-sum-exps and positives combine exactly. Memory: O(B D + C D / ranks), B the rows
    of all ranks.

    Args:
        num_classes: C. embedding_size: D.
        mesh: a DeviceMesh of one dimension, None for all ranks of the process group. Where it has its devices the
            weight is made.
        embedding_gradient_scale: a factor of the gradients of what the call is given. DDP and FSDP divide the
            gradients of a backbone by the number of ranks whose data it sees: given here, that number undoes it.
        equal_batches: True is a promise that every rank calls with as many rows, of one dtype: nothing is compared in
            a step, the host of a GPU waits for nothing, and an error of one rank is its own.
        sample_rate: r in (0, 1]. Below 1 a step uses the classes of its rows and, of all others, each with probability
            r, by a hash of `sample_seed`, step and class: the same on any number of ranks. See `attach`.
        options: as for `MarginSoftmaxLoss`, the same on all ranks. Tensors (C,) are given whole.

    Attributes:
        weight: parameter, a DTensor (C, D) or (C, K, D), Shard(0). The margins of classes, `class_weight` and
            `logit_bias` are (C,) DTensors likewise.
        scale: a number, or a 0-d parameter with the same value on all ranks.
        margin: likewise.

    `reset_parameters` draws the weight by torch's generator: seeded equally on all ranks, it gives the values that it
    gives on any other number of ranks. The weight is made where the mesh is, whatever `torch.device` block is active.

    Call: loss(embeddings (B_r, D), labels (B_r,) integers in [0, C)) gives the mean over the rows of all ranks that are
    not ignored, the same on every rank; "sum" likewise, and "none" the losses (B_r,) of the own rows. scale, margin,
    angular_margin_rad: (B_r, 1) tensors or None, those of each sample instead of the module's.

    Raises:
        ValueError, TypeError, IndexError: on all ranks, with the number of the first rank that has the error: as
            `MarginSoftmaxLoss`; options that differ, when it is made; dtypes and arguments that differ, in a call.
        RuntimeError: without a process group; a weight that is not the module's own any more. A rank that makes no call
            is an error of torch's on the others, at the time-out of the process group.

    Gradients: those of that mean, for a gradient that comes in equally on all ranks: of the own embeddings and of
    per-sample values, multiplied by `embedding_gradient_scale`; of the own classes; of a scale or margin that is a
    number, summed over ranks here. The loss belongs outside of DDP; inside of what `fully_shard` takes, its parameters
    are among the `ignored_params`.

    Source: An et al., Killing two birds with one stone: Efficient and robust training of face recognition CNNs by
    Partial FC, 2022, section 3, the distribution of classes; the loss as `MarginSoftmaxLoss`.

    >>> import torch
    >>> from torch import distributed as dist
    >>> from fused_margins.distributed import ShardedMarginSoftmaxLoss
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun needs none
    >>> loss = ShardedMarginSoftmaxLoss(num_classes=10, embedding_size=64, margin=0.5, margin_type="angular")
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape, loss.weight.placements
    (torch.Size([10, 64]), (Shard(dim=0),))
    >>> dist.destroy_process_group()
    """

    sample_step: Tensor
    _exchange: Exchange | None = None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        mesh: DeviceMesh | None = None,
        embedding_gradient_scale: float = 1.0,
        equal_batches: bool = False,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        **options: Any,
    ) -> None:
        with together("ShardedMarginSoftmaxLoss", one_dimension(mesh)) as own:
            self._shards = Shards(checks.integer("num_classes", num_classes, 1), mesh)
            super().__init__(num_classes, embedding_size, **options)
            self.embedding_gradient_scale = checks.finite_number("embedding_gradient_scale", embedding_gradient_scale)
            self.equal_batches = checks.flag("equal_batches", equal_batches)
            self._set_sample(sample_rate, sample_seed)
            # What scales gradients of the own rows alone may differ.
            own.same = {"num_classes": num_classes, "embedding_size": embedding_size, "equal_batches": equal_batches}
            own.same |= {"sample_rate": self.sample_rate, "sample_seed": sample_seed}
            own.same |= settings(MarginSoftmaxLoss.__init__, options)
            for parameter in self.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(self._shards.mesh.device_type)

    def _set_sample(self, rate: float, seed: int) -> None:
        self.sample_rate, self.sample_seed = checks.number("sample_rate", rate), checks.integer("sample_seed", seed)
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate: expected a number in (0, 1], got {rate}")
        if self.sample_rate < 1 and self.label_smoothing:
            raise ValueError(f"label_smoothing: expected 0 where classes are sampled, got {self.label_smoothing}")
        if self.sample_rate < 1:
            self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets an optimizer that has the weight step the sampled rows alone: others move by no momentum and no decay.

        From a backward to the step, the optimizer's parameter is the rows that got a gradient, with their part of its
        state. The optimizer steps each number by itself, from a state that begins with zeros, as SGD, Adam and AdamW,
        RMSprop and Adagrad do. A step of it is a step of the sample: batches whose gradients add up have the same one.
        For a `sample_rate` of 1 nothing is changed. A copy of the loss is attached to none.

        Raises, on all ranks:
            ValueError: an optimizer without the weight. TypeError: Adafactor, LBFGS, Rprop, SparseAdam.
            RuntimeError: in a step, a gradient of the whole weight beside that of its rows; in a backward, one of a
                forward before the last step.
        """
        with together("attach", self._shards.group):
            if self.sample_rate < 1:
                self._exchange = Exchange(self.weight, self._shards, optimizer, self._after_step)

    def _after_step(self) -> None:
        self.sample_step += 1

    def _sample(self, exchange: Exchange, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that a step uses of this rank's classes, and which these are."""
        shards, here = self._shards, self._shards.here(labels)
        drawn = draw(
            shards.first, shards.stop, self.sample_rate, self.sample_seed, int(self.sample_step), labels.device
        )
        index = torch.cat([drawn - shards.first, here[here >= 0]]).unique()
        return exchange.take(index), index

    @property
    def _samples(self) -> bool:
        return self.sample_rate < 1 and torch.is_grad_enabled()

    def _empty(self, *shape: int) -> Tensor:
        return self._shards.empty(*shape)

    def _kept(self, values: Tensor) -> Tensor:
        if isinstance(values, nn.Parameter):
            raise TypeError(
                "margin: expected a plain tensor, of which every rank keeps a copy of its part, got a Parameter; "
                "learnable_margin=True lets it learn"
            )
        return self._shards.part(values)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given: Any = state_dict.get(prefix + "weight")
        if isinstance(given, Tensor) and isinstance(self.weight, DTensor) and not isinstance(given, DTensor):
            raise TypeError(
                f"{prefix}weight: expected a DTensor, as this module has, got a plain tensor in the state dict; "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict spreads it over the ranks, with "
                "options=StateDictOptions(full_state_dict=True)"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _draw(self) -> None:
        self._shards.draw_normal_(self.weight, self.embedding_size**-0.5)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        scale: Tensor | None = None,
        margin: Tensor | None = None,
        angular_margin_rad: Tensor | None = None,
    ) -> Tensor:
        of_samples = dict(zip(_OF_SAMPLES, (scale, margin, angular_margin_rad)))
        rows = self._gathered(embeddings, labels, {n: v for n, v in of_samples.items() if v is not None})
        weight, index = rows.weight, None
        if self._exchange is not None and self._samples:
            weight, index = self._sample(self._exchange, rows.labels)
        negative_lse, of_row = self._combined(*self._terms(rows, weight, index))
        counted, plain = rows.labels != IGNORED, cross_entropy(negative_lse, of_row.z)
        of_others = spread(plain, of_row)
        loss, row_weight = losses(plain, of_row.row_weight, of_others, counted, self.label_smoothing, self.num_classes)
        loss = reduce_loss(loss, row_weight, checks.choice("reduction", self.reduction, Reduction))
        return own_rows(loss, rows.counts, self._shards.group) if self.reduction == "none" else loss

    def _own_classes(self) -> Tensor:
        """The part of the weight that is here, in which autograd goes back to the whole."""
        weight: Tensor = self.weight
        mesh, got = self._shards.mesh, ""
        if not isinstance(weight, DTensor):
            got = "a plain tensor"
        elif weight.placements != (Shard(0),) or weight.device_mesh != mesh:
            got = f"{weight.placements} of {weight.device_mesh}"
        if got:
            raise RuntimeError(
                f"weight: expected the DTensor Shard(0) over {mesh} that this module made, got {got}; the loss stays "
                "outside of DDP, and fully_shard takes ignored_params=set(loss.parameters())"
            )
        return _local(weight)

    def _gathered(self, embeddings: Tensor, labels: Tensor | None, of_samples: dict[str, Tensor]) -> _Rows:
        """The rows of all ranks, checked, without labels for predictions; an error of one rank is raised on all."""
        group = self._shards.group
        with together("forward" if labels is not None else "predictions", group, not self.equal_batches) as own:
            weight = self._own_classes()
            self.require_values()
            check_device(embeddings, weight)
            vectors = weight if weight.dim() == 2 else weight[:, 0]
            embeddings, _ = checks.matrices(embeddings, vectors, ("embeddings", "weight"))
            own.rows = embeddings.shape[0]
            if labels is None:
                labels = torch.zeros(own.rows, dtype=torch.int64, device=weight.device)
            checks.labels("labels", labels, own.rows, embeddings)
            labels = check_index(labels, self.num_classes, self.ignore_index, "labels")
            of_samples = {name: _of_samples(name, value, embeddings) for name, value in of_samples.items()}
            if self._samples and self._exchange is None:
                raise RuntimeError(
                    f"sample_rate: expected 1 without an optimizer, got {self.sample_rate}; loss.attach(optimizer) "
                    "hands it the sampled rows"
                )
            if not self.equal_batches:
                own.same = self._alike(embeddings, of_samples)
        embeddings = scale_gradient(embeddings, self.embedding_gradient_scale)
        labels, every = gather_rows(labels, own.counts, group), gather_rows(embeddings, own.counts, group)
        if of_samples:
            columns = scale_gradient(torch.cat(list(of_samples.values()), dim=1), self.embedding_gradient_scale)
            columns = gather_rows(columns, own.counts, group)
            of_samples = dict(zip(of_samples, columns.split(1, dim=1)))
        return _Rows(weight, own.counts, every, labels, of_samples)

    def _alike(self, embeddings: Tensor, of_samples: dict[str, Tensor]) -> dict[str, Any]:
        """What a call has the same on all ranks, of the module what training moves."""
        learns = torch.is_grad_enabled()
        alike: dict[str, Any] = {"dtype": embeddings.dtype, "values of samples": ", ".join(of_samples) or None}
        for name, value in {"embeddings": embeddings, **of_samples}.items():
            alike[f"a gradient of {name}"] = learns and value.requires_grad
        for name, number in (("scale", self.scale), ("margin", self.margin)):
            if isinstance(number, nn.Parameter) and not isinstance(number, DTensor):
                alike[name] = number.item()
        if self.sample_rate < 1:
            alike |= {"gradients": learns, "sample_step": int(self.sample_step)}
        return alike

    def _terms(self, rows: _Rows, weight: Tensor, index: Tensor | None) -> tuple[Tensor, Terms]:
        """negative_lse (B,) and the rest, of the classes of this rank, or of those at `index` alone."""
        centers = None if weight.dim() == 2 else weight
        vectors = weight if centers is None else weight[:, 0]
        target = self._shards.here(rows.labels)
        if index is not None:
            target = torch.where(target < 0, target, torch.searchsorted(index, target))
        embeddings, vectors = checks.matrices(rows.embeddings, vectors, ("embeddings", "weight"))
        settings = {"scale": self.scale, "margin": self.margin, **self.margin_options}
        settings = {name: self._in_own_way(value, index) for name, value in settings.items()} | rows.of_samples
        scale = settings.pop("scale")
        if isinstance(scale, Tensor):
            scale = checks.row_factor("scale", scale[:, 0] if scale.dim() else scale, embeddings, positive=True)
        similarity, margin = settings.pop("similarity"), settings.pop("margin")
        own = check_margin(target, vectors, similarity, margin, *settings.values())
        bias, class_weight = (self._in_own_way(t, index) for t in (self.logit_bias, self.class_weight))
        bias = checks.vector("logit_bias", bias, vectors.shape[0], vectors)
        class_weight = checks.vector("class_weight", class_weight, vectors.shape[0], vectors)
        call = Contrast(embeddings, vectors, target, None, None, None, scale, bias, 0.0, own.similarity)
        call, u, negative_lse = class_vectors(call, centers, self.center_temperature, -1, self.backend)
        of_all = None
        if self.label_smoothing > 0:
            each = u.new_ones(vectors.shape[0]) if class_weight is None else class_weight
            of_all = similarity_sum(call.x, call.y, each, own.similarity)
        own_terms = terms(
            call.target, call.target == ABSENT, u, of_all, own, call.scale, bias, class_weight, vectors.shape[0]
        )
        # A rank without classes has gradients of its weight and margins like all others, empty ones.
        empty = [t.sum() for t in (weight, margin) if isinstance(t, Tensor) and not t.numel()]
        return negative_lse, own_terms._replace(z=sum(empty, own_terms.z))

    def _in_own_way(self, value: Any, index: Tensor | None) -> Any:
        """A setting as this rank uses it: of one a class its part, of one for all the whole."""
        if isinstance(value, DTensor):
            return _local(value) if index is None else _local(value)[index]
        return share(value, self._shards.group) if isinstance(value, nn.Parameter) else value

    def _combined(self, negative_lse: Tensor, own: Terms) -> tuple[Tensor, Terms]:
        """Of all classes, the same on all ranks."""
        group = self._shards.group
        vectors = [t for t in (own.z, own.row_weight, own.everyone) if t is not None]
        negative_lse, z, *others = combine(negative_lse, *vectors, group=group)
        row_weight = None if own.row_weight is None else others.pop(0)
        each = None if own.each is None else sum_over_ranks(own.each, group)
        return negative_lse, Terms(z, row_weight, others.pop(0) if others else None, each)

    def predictions(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without the margin, of the rows of all ranks in their order: a DTensor Shard(1), no graph."""
        shards = self._shards
        with torch.no_grad():
            rows = self._gathered(embeddings, None, {})
            similarity = self.margin_options["similarity"]
            options = {"similarity": similarity, "center_temperature": self.center_temperature, "backend": self.backend}
            scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
            local = margin_logits(rows.embeddings, rows.weight, scale=scale, **options)
        shape = torch.Size((local.shape[0], self.num_classes))
        return DTensor.from_local(local, shards.mesh, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1))

    def to_linear(self) -> LinearHead:
        """Not of a loss whose classes no rank holds: load its state dict into a `MarginSoftmaxLoss` first."""
        raise RuntimeError(
            "to_linear: expected a loss of one process, got one over many ranks; load its state dict into a "
            "MarginSoftmaxLoss, whose to_linear this is"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes={self._shards.first}..{self._shards.stop}"


def _local(t: Tensor) -> Tensor:
    """The part that is here, in which autograd goes back to the whole."""
    own: Tensor = t.to_local()  # type: ignore[attr-defined]
    if own.requires_grad:
        # A gradient that lies otherwise than the whole is copied, for which DTensors of torch 2.11 gather it from all
        # ranks, though it be one rank's alone. One without elements passes for contiguous however it lies.
        own.register_hook(lambda grad: grad.contiguous() if grad.numel() else grad.new_zeros(grad.shape))
    return own


def _of_samples(name: str, value: Tensor, embeddings: Tensor) -> Tensor:
    """(B, 1) values in the accumulation dtype of the embeddings."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (embeddings.shape[0], 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected one a sample ({embeddings.shape[0]}, 1), got {got}")
    checks.dense(name, value)
    return checks.floating(name, value, embeddings)
