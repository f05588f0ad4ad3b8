"""The live page: music that follows what you type. `python -m live`"""
