"""AdamW with Lisa's pull towards an anchor, as an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

from fastlock.errors import FastlockError
from fastlock.finetuning.held_tensors import HeldTensors
from fastlock.finetuning.optimizer_groups import (
    WITHOUT_PULL,
    check_gradient,
    check_group,
    check_loaded,
    check_rounding,
    not_empty,
    settings_of,
)
from fastlock.finetuning.sharded_tensors import local, sharding_of, sum_over_shards
from fastlock.finetuning.step_runner import StepOptions, StepParameter, StepRunner
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors

# Of a drift, so many numbers are looked at together: its memory does not grow with the model.
_CHUNK = 2**24
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _not_compiled(method: _Method) -> _Method:
    """What a loop that is compiled runs as it is; as torch's own optimizers say it, without importing the compiler."""
    return cast(_Method, _disable_dynamo(method))


class ProximalAdamW(torch.optim.Optimizer):
    """AdamW, and a pull of every weight towards its anchor: Lisa's optimizer (arXiv 2405.18641), or one of your own.

    With an anchor and a `pull` ρ, each step adds ρ (w - anchor), the gradient of ρ/2 ‖w - anchor‖², to the gradient
    of the loss; it passes through Adam's moments with it, and is in no loss. Without an anchor, or with pull 0, this is
    `torch.optim.AdamW`: on a CPU, bit for bit the one with foreach=False.

    On a CUDA device, the step of all float32 and bfloat16 parameters of the same dtypes is one launch, clipping one
    more; what is not contiguous or of another dtype is stepped in plain PyTorch, as everything is elsewhere. A
    GradScaler leaves its scale and its verdict to this step: after infinite gradients nothing is touched.

        optimizer = fastlock.ProximalAdamW(model.parameters(), lr=1e-5, pull=1.0)
        optimizer.anchor()            # the weights as they are now
        ...
        optimizer.step()
        optimizer.drift()             # how far they have moved since

    The anchor is in the optimizer's state, beside the moments: it is saved and loaded with them, in its own dtype.
    Before a distributed checkpoint with an anchor is loaded in place, call `anchor()`, to make room for it.

    Args:
        params: parameters, named ones, or groups of them, as for any optimizer. Each argument but the first may be
            given for a group, too, except max_grad_norm, which is of all groups together.
        lr, betas, eps, weight_decay: those of `torch.optim.AdamW`. lr may be a tensor of one number; if it is on a
            device, each step waits for it.
        pull: ρ, at least 0.
        anchor_decay: the decoupled form, at least 0: each step moves w by lr * anchor_decay * (anchor - w), beside the
            moments, as weight decay moves it towards 0. It is another method than Lisa's.
        max_grad_norm: the gradients, the term included, are scaled down to this total norm, as
            `torch.nn.utils.clip_grad_norm_` does; None: they are not. Do not clip them yourself then. Over the shards
            of DTensors the norm is summed; of ZeRO's flat partitions it would be each rank's own: let ZeRO clip.
        state_dtype: of the moments: torch.float32 or torch.bfloat16; None: the parameter's.
        anchor_dtype: of the anchor: torch.float32; None: the parameter's.
        stochastic_rounding: what is kept in bfloat16 of bfloat16 parameters, weights and moments, is rounded up or
            down at random, so that small steps are not lost. The bits depend on the seed, the step and the place of
            each number alone.
        seed: of that rounding.

    Raises:
        FastlockError: a number is out of its range, there is no parameter, or no bfloat16 one to be rounded
            stochastically.
        UnsupportedError: a parameter is complex.
    """

    # A GradScaler leaves the division by its scale, and the decision whether to step, to such an optimizer.
    _step_supports_amp_scaling = True
    _undecided: tuple[Callable[[], bool], Callable[[], None]] | None

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        pull: float = 1.0,
        anchor_decay: float = 0.0,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self._begin()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "pull": pull,
            "anchor_decay": anchor_decay,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "anchor_dtype": anchor_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "anchored": False,
        }
        settings_of(defaults, "the arguments")
        super().__init__(not_empty(params), defaults)
        check_rounding(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's. After `anchor()`, call it again: until then the new parameters have none."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups, len(self.param_groups) - 1)
        except FastlockError:
            self.param_groups.pop()
            raise

    @_not_compiled
    @torch.no_grad()
    def anchor(self) -> None:
        """Take the weights as they are for the anchor, of every parameter that requires a gradient."""
        self._settle()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    state = self._state(parameter, group)
                    dtype = group["anchor_dtype"] or parameter.dtype
                    if "anchor" in state and state["anchor"].dtype == dtype:
                        state["anchor"].copy_(parameter)  # where it is: the kernel's table stays as it is
                    else:
                        state["anchor"] = parameter.detach().to(dtype, copy=True)
            group["anchored"] = True

    @_not_compiled
    @torch.no_grad()
    def drift(self) -> float:
        """‖w - anchor‖ over all parameters, summed over their shards; waits for the device.

        With DTensors it is collective: call it on every rank.

        Raises:
            FastlockError: there is no anchor.
        """
        sums = []
        for parameter, state in self.state.items():
            if "anchor" in state:
                weight, anchor = (local(x).flatten() for x in (parameter, state["anchor"]))
                total = torch.zeros((), dtype=torch.float64, device=weight.device)
                for w, a in zip(weight.split(_CHUNK), anchor.split(_CHUNK), strict=True):
                    total += (w.float() - a.float()).double().square().sum()
                sums.append((total, sharding_of(parameter)))
        if not sums:
            raise FastlockError("there is no anchor to measure from. Call anchor() first.")
        return math.sqrt(sum_over_shards(sums).item())

    @_not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. What is wrong is found before anything moves.

        Args:
            closure: computes the loss and the gradients anew.

        Returns:
            the closure's loss, or None.

        Raises:
            FastlockError: a number of a group is out of its range, or a parameter was added after the anchor.
            UnsupportedError: a gradient is sparse; or a CUDA graph is being captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        groups = self.param_groups
        settings = [settings_of(group, f"group {i}") for i, group in enumerate(groups)]
        every = [parameter for group in groups for parameter in group["params"]]
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        options = StepOptions(found_inf, grad_scale, groups[0]["max_grad_norm"])
        take_back = self._runner.again(every, self.state, settings, options)
        if take_back is None:
            take_back = self._step_anew(every, settings, options)
        if options.found_inf is not None and take_back is not None:
            self._undecided = (_on_host(options.found_inf), take_back)
            if options.found_inf.device.type != "cuda":
                self._settle()  # nothing has to be waited for
        return loss

    def _step_anew(
        self, every: list[torch.Tensor], settings: list[StepSettings], options: StepOptions
    ) -> Callable[[], None] | None:
        """Step all that has a gradient, and count it; what is returned takes back the count."""
        self._check_gradients(settings)
        gathered = list(self._gathered(settings))
        steps = [self.state[parameter]["step"] for parameter, _, _ in gathered if parameter.grad is not None]
        if not steps:
            return None
        stepped = [one for _, _, one in gathered]
        by_kernels = self._runner.run(stepped, options)
        torch._foreach_add_(steps, 1)
        if by_kernels:
            parameters, places = [parameter for parameter, _, _ in gathered], [place for _, place, _ in gathered]
            tensors = [one.tensors for one in stepped]
            held = HeldTensors(every, self.state, parameters, places, tensors, settings)
            self._runner.hold(held)
            steps = [self.state[parameter]["step"] for parameter in parameters if parameter.grad is not None]
        return lambda: torch._foreach_sub_(steps, 1)

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; the anchor is in the state of each parameter."""
        self._settle()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; but moments and anchors keep the dtype that they were saved in. Or nothing is loaded.

        Raises:
            FastlockError: a moment or an anchor has another shape than its parameter, an anchor was saved and is not
                there, or a number of a group is out of its range.
            UnsupportedError: it is another optimizer's state, with amsgrad or maximize.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        given: dict[str, Any] = {}
        hook = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))  # after all other hooks
        try:
            super().load_state_dict(state_dict)
            self._keep_dtypes(given)
            check_loaded(self.param_groups, self.state)
        except BaseException:
            self.__setstate__(before)
            raise
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        for group in self.param_groups:
            for name, value in {**WITHOUT_PULL, **getattr(self, "defaults", {})}.items():
                group.setdefault(name, value)

    def _begin(self) -> None:
        self._runner = StepRunner()
        # Of a step whose found_inf is still on its way to the host: what waits for it, and what takes back the count.
        self._undecided = None

    def _settle(self) -> None:
        """Take back the count of a step that, as the device found, did not take place."""
        if self._undecided is not None:
            (found, take_back), self._undecided = self._undecided, None
            if found():
                take_back()

    def _state(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made when it is first wanted: what wraps a model may replace its parameters."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            dtype = group["state_dtype"] or parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _check_gradients(self, settings: list[StepSettings]) -> None:
        anchored = any(group["anchored"] for group in self.param_groups)
        for group, of_group in zip(self.param_groups, settings, strict=True):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    wanted = anchored and of_group.acts
                    check_gradient(parameter, wanted and "anchor" not in self.state.get(parameter, {}), group, place)

    def _gathered(self, settings: list[StepSettings]) -> Iterator[tuple[torch.Tensor, int, StepParameter]]:
        """Every parameter that has a gradient or a state, its group, and what its step needs."""
        ordinal = -1
        for place, (group, of_group) in enumerate(zip(self.param_groups, settings, strict=True)):
            for parameter in group["params"]:
                ordinal += 1
                if parameter.grad is not None or "step" in self.state.get(parameter, {}):
                    yield parameter, place, self._stepped(parameter, group, of_group, ordinal)

    def _stepped(
        self, parameter: torch.Tensor, group: dict[str, Any], settings: StepSettings, ordinal: int
    ) -> StepParameter:
        state = self._state(parameter, group)
        anchor = state.get("anchor") if settings.acts else None
        tensors = StepTensors(
            weight=local(parameter),
            grad=None if parameter.grad is None else local(parameter.grad),
            exp_avg=local(state["exp_avg"]),
            exp_avg_sq=local(state["exp_avg_sq"]),
            anchor=None if anchor is None else local(anchor),
            settings=settings,
            step=state["step"].item() + 1,
            ordinal=ordinal,
        )
        return StepParameter(tensors, sharding_of(parameter))

    def _keep_dtypes(self, given: dict[str, Any]) -> None:
        """torch casts all that it loads, but the step, to the parameter's dtype: put the rest back as it was saved."""
        places = [place for group in given["param_groups"] for place in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            for name, value in given["state"].get(place, {}).items():
                if name == "step":
                    self.state[parameter][name] = torch.as_tensor(value, dtype=torch.float32).detach().cpu().clone()
                elif isinstance(value, torch.Tensor) and value.dtype != parameter.dtype:
                    self.state[parameter][name] = value.to(device=parameter.device, copy=True)


def _on_host(found_inf: torch.Tensor) -> Callable[[], bool]:
    """Copy a number to the host without waiting; the function waits for it."""
    if found_inf.device.type != "cuda":
        return lambda: bool(found_inf)
    host = torch.empty(1, dtype=found_inf.dtype, pin_memory=True)
    host.copy_(found_inf.reshape(1), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def found() -> bool:
        arrived.synchronize()
        return bool(host.item())

    return found
