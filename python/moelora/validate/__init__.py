"""Proves on a checkpoint that one pass of moelora does what N passes of stock PEFT did: ``moelora validate``."""
