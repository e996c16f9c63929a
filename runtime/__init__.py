"""What an artifact carries: the plan, the cache and its arithmetic. Needs torch and safetensors alone."""
