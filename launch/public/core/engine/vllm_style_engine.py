"""The import path of the original usage examples; the thing itself is in `launch/vllm_style.py`."""

from fast_inference.launch.vllm_style import create_vllm_style_engine
from fast_inference.protocol.policy_names import SchedulerPolicy
from fast_inference.protocol.sampling import SamplingParams

__all__ = ["SamplingParams", "SchedulerPolicy", "create_vllm_style_engine"]
