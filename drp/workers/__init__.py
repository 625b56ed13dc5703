"""Workers: the processes that evaluate the denoiser, one a device."""
