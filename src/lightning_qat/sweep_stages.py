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
        return f"stage={','.join(stages)}: the others start from what fp32 leaves: put it first."
    if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
        return (
            "this launcher runs jobs at the same time, and the other stages start from what "
            "stage=fp32 leaves: run -m stage=fp32 first, and then the others with this launcher."
        )
    given = {override.get_key_element().lstrip("+") for override in of_a_sweep(config)}
    trains = [x for x in swept if x not in _OF_NO_WEIGHTS and not x.startswith(_BELOW)]
    if trains and "fp32_ckpt" not in given:
        values = "-".join(
            f"${{{x}}}" if "." in x else f"${{hydra:runtime.choices.{x}}}" for x in trains
        )
        return (
            f"the stage=fp32 of each value of {', '.join(trains)} would leave its weights in the "
            "same file, and the others would start from the last: give each a file of its own, "
            f"'fp32_ckpt=${{output_dir}}/fp32/{values}.ckpt'."
        )
    return None
