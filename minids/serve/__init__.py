"""An OpenAI-compatible server and a page, on the engine of `minids.infer`."""
