"""A layer's weights as a linear map: which rows its Kronecker factors are sums over."""
