"""What every fork has and AUTOMATIC1111's WebUI has not."""
