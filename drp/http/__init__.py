"""The HTTP gateway to a drp server or a diffusers pipeline: OpenAI's images endpoint, health, metrics and a page."""
