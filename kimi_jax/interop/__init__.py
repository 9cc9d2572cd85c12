"""Public checkpoints: config.json and safetensors in the tensor names of the released Kimi Linear, out and in."""
