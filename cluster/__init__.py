"""SPTS on Ray: tensor-parallel ranks on DeepSpeed, engines that own them, and an OpenAI endpoint on Serve."""
