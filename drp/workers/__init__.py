"""Workers: the processes that evaluate the denoiser, one per device."""
