"""What a model does, layer by layer: key shift, attention maps, errors of the new layers."""
