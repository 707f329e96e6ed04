"""What converting would gain on this device, and which layers to convert."""
