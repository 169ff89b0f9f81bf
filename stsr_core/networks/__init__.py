"""The conditional mean network, the residual denoiser, and the layers they share."""
