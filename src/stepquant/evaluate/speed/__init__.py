"""Times: of calls, of whole generations, of layers and of operations."""
