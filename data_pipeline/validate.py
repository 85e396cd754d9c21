def check(root):
    return None
