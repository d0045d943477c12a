"""KV policies: which keys each head keeps."""
