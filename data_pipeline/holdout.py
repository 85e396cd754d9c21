def build(options, source, command):
    raise NotImplementedError
