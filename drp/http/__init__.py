"""HTTP: images in OpenAI's convention, health, metrics and a page, in front of a server or of a diffusers pipeline."""
