"""Recurrent networks that learn their rank (planned: GRU, LSTM and FastGRNN; see CHANGELOG.md)."""
