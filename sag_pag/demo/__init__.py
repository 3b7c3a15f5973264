"""A small trained model that shows what the guidances do, without a WebUI."""
