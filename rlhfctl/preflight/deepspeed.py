"""What DeepSpeed asks of this machine (X030, X031)."""

import importlib.util
import os
import shutil

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs


def deepspeed_findings(inputs: Inputs, bfloat16: bool) -> list[Finding]:
    """X030: DeepSpeed's AdamW for offloaded state is compiled at its first use. X031: ZeRO-0 in bfloat16."""
    spec = inputs.recipe.deepspeed
    if spec is None:
        return []
    findings = []
    compiler = os.environ.get("CXX", "c++")
    lacks = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        lacks.append("ninja")
    if spec.offload != "none" and lacks:
        findings.append(
            Finding(
                "X030",
                "error",
                f"deepspeed.offload {spec.offload} needs {' and '.join(lacks)}, which this machine lacks",
                "DeepSpeed compiles its AdamW for CPU memory at the first start",
                "install g++ and ninja, or set deepspeed.offload: none",
                "machine",
                {"lacks": lacks},
                exit_code=4,
            )
        )
    if spec.zero_stage == 0 and bfloat16:
        findings.append(
            Finding(
                "X031",
                "error",
                "deepspeed.zero_stage 0 keeps no float32 master weights, and policy.dtype auto is bfloat16 here",
                fix="set deepspeed.zero_stage: 1, or policy.dtype: float32",
                side="machine",
                exit_code=4,
            )
        )
    return findings
