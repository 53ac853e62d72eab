"""What a fault costs, as ratios to what the kernel itself asks for: `edm bench`.

Off the path of a fault: it starts `edm run` with a program that touches pages and times itself (native/bench/).
"""
