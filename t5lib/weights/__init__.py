"""Other people's weights and names, as models of ours."""
