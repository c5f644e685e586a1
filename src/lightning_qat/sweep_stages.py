"""Check a sweep that runs stage=fp32 together with stages that start from its ``fp32_ckpt``."""

from omegaconf import DictConfig

from lightning_qat.overrides import of_a_sweep

# FP32 training does not depend on these. The first four are part of the name of its file.
_OF_NO_WEIGHTS = (
    *("seed", "data", "model", "output_dir"),
    *("qconfig", "overrides", "only", "distill", "allow_saturation"),
    *("latency_seconds", "uint8_input", "export_onnx"),
)
_BELOW = ("qconfig.", "recipe.qat.", "budget.")


def refused(config: DictConfig) -> str | None:
    """Return why jobs of this sweep could use the wrong weights and what to do, or None."""
    swept = {
        override.get_key_element().lstrip("+"): list(override.sweep_string_iterator())
        for override in of_a_sweep(config)
        if override.is_discrete_sweep()
    }
    stages = swept.pop("stage", [])
    if "fp32" not in stages or set(stages) == {"fp32"}:
        return None
    if stages[0] != "fp32":
        return f"stage={','.join(stages)}: the others start from the weights of fp32: put it first."
    if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
        return (
            "this launcher runs jobs at the same time, but the other stages start from the weights "
            "of stage=fp32: run -m stage=fp32 first, and then the others with this launcher."
        )
    given = {override.get_key_element().lstrip("+") for override in of_a_sweep(config)}
    trains = [x for x in swept if x not in _OF_NO_WEIGHTS and not x.startswith(_BELOW)]
    if trains and "fp32_ckpt" not in given:
        values = "-".join(
            f"${{{x}}}" if "." in x else f"${{hydra:runtime.choices.{x}}}" for x in trains
        )
        return (
            f"stage=fp32 would write its weights to the same file for each value of "
            f"{', '.join(trains)}, and the other stages would start from the last weights: give "
            f"each value its own file, 'fp32_ckpt=${{output_dir}}/fp32/{values}.ckpt'."
        )
    return None
