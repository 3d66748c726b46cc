"""What connects the ops to other libraries; a module needs the library that it is named after."""
