"""Bridges to other libraries, one module each, imported only by those who use them."""
