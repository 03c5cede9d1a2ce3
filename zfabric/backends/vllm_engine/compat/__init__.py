"""All that knows the inside of vLLM, or that differs between its versions. A new release is a matter of this package.

Written for vLLM 0.31 and 0.32. The rest of the backend uses what vLLM documents for callers of its asynchronous engine.
"""
