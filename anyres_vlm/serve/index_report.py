def require_matplotlib(): pass
def draw_report(index, tiling): return None
