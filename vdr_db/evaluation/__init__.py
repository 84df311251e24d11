"""How well a collection ranks: metrics, test collections, sweeps over k."""
