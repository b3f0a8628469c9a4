"""Bodies of requests and answers, as OpenAI's API has them, and Loom's own beside them."""
