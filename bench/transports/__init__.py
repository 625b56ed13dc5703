"""Carriers: the same runs on the same emulated devices, with the messages and latents carried by different means."""
