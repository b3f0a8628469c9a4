"""The demo world: pictures of coloured shapes, a tiny Qwen2-VL that reads them, and adapters with new skills."""
