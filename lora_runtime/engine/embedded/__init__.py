"""The engine on plain torch and transformers: installs anywhere, serves anything the weights form expresses."""
